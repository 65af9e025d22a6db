"""Filling a model's parameters from a checkpoint, each element exactly once, each rank its own bytes.

Headers first, then a plan of byte ranges, then reads. Knows nothing of processes: a rank calls it with its own
shard of the model, and with the exchange that joins it to the other ranks of its host.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import torch
from torch import nn

from tprt.weights.checkpoint import open_checkpoint
from tprt.weights.exchange import LoadExchange
from tprt.weights.matching import match_tensors
from tprt.weights.placement import Placement
from tprt.weights.read_plan import ReadPlan, make_read_plan
from tprt.weights.reading import Reading
from tprt.weights.report import LoadReport


def load_model(
    model: nn.Module,
    path: str,
    exchange: LoadExchange | None = None,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    needs_all: bool = True,
) -> LoadReport:
    """Fill every parameter of `model` from the checkpoint in folder `path`.

    Args:
        model: with this rank's parameters, on any device, in any floating type.
        path: the folder.
        exchange: joins the ranks of this host, all of which load the same checkpoint at the same time; without
            it this rank reads by itself all that it needs a part of.
        on_progress: is told, from several threads, how many of this rank's bytes are in place, of how many.
        needs_all: whether the ranks of this host need all of the checkpoint between them.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit: tensors that match no parameter,
            parameters that no tensor fills and wrong shapes are listed together, by checkpoint name.
        TransportTimeoutError: another rank does not do its part.
    """
    started_s = time.monotonic()
    checkpoint = open_checkpoint(path)
    matches = match_tensors(model, checkpoint)
    plan = make_read_plan(matches)
    own_bytes, shared_bytes = _kept_bytes(plan, shared=False), _kept_bytes(plan, shared=True)
    placement = Placement()
    reading = Reading(plan, placement, exchange, past_cache=not needs_all)
    reading.run(lambda: on_progress(placement.placed_bytes, own_bytes + shared_bytes))
    placement.finish(matches)
    return LoadReport(
        file_bytes=checkpoint.num_bytes,
        own_kept_bytes=own_bytes,
        own_read_bytes=reading.own_read_bytes,
        shared_kept_bytes=shared_bytes,
        shared_read_bytes=reading.shared_read_bytes,
        cached_bytes=reading.cached_bytes,
        seconds=time.monotonic() - started_s,
    )


def load_dummy_weights(model: nn.Module) -> None:
    """Fill every parameter with small random numbers that depend on its name only, norms with ones."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.data.normal_(0.0, 0.02, generator=generator)


def _kept_bytes(plan: ReadPlan, shared: bool) -> int:
    pieces = (piece for chunk in (*plan.own, *plan.shared) for piece in chunk.pieces)
    return sum(piece.kept_bytes for piece in pieces if piece.match.part.shared == shared)
