"""Whether the files of the checkpoint are whole and hold the model that its config.json describes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from launch.doctor.finding import Finding, bad, ok, refused, skipped
from launch.doctor.request import DoctorRequest
from launch.planning.plan import planned_device, shape_model
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config, ParallelConfig
from tprt.errors import CheckpointError, UnsupportedModelError
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights.checkpoint import open_checkpoint
from tprt.weights.matching import match_tensors
from tprt.worker.model_runner import resolve_dtype

_NAME = "checkpoint"
_FETCH = "fetch the checkpoint again, or set model.path to the right one"
_MIB = 2**20


def check_headers(request: DoctorRequest) -> Iterator[Finding]:
    """Read the headers of all files, as a start does, and compare their tensors with the model's."""
    config = request.config
    if config.model.load_format == "dummy":
        yield skipped(_NAME, "model.load_format is dummy: no weights are read")
        return
    try:
        checkpoint = open_checkpoint(config.model.path)
        match_tensors(_whole_model(config), checkpoint)
    except (CheckpointError, UnsupportedModelError) as error:
        yield refused(_NAME, error, _FETCH)
    except OSError as error:
        fix = "let the user who starts the deployment read every file of model.path (ls -l, id)"
        yield bad(_NAME, f"{error.filename} cannot be read: {error.strerror}", fix)
    else:
        num_files = len({entry.file for entry in checkpoint.tensors.values()})
        text = (
            f"{len(checkpoint.tensors)} tensors in {num_files} files, {checkpoint.num_bytes // _MIB:,} MiB:"
            " whole, and those of the model"
        )
        yield ok(_NAME, text, num_bytes=checkpoint.num_bytes, num_files=num_files)


def _whole_model(config: Config) -> nn.Module:
    """Return the model of one rank alone, without memory: its tensors are those of any number of ranks."""
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    checkpoint = read_checkpoint_config(config.model.path)
    (shard,) = make_shard_plan(shape_of(checkpoint), 1).shards
    return shape_model(alone, checkpoint, shard, resolve_dtype(config, checkpoint, planned_device(config)))
