"""Filling a model's parameters from a checkpoint, each element exactly once.

All tensors are matched with the parameters by name and shape before any byte is copied; what does not fit
is reported in one error. A module may name its `packed_modules_mapping`; parameters may carry a
`weight_loader`. Knows nothing of processes: a rank calls it with its own shard of the model.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tprt.errors import CheckpointError
from tprt.layers.parameter import ShardedParameter, ShardId
from tprt.weights.checkpoint import Checkpoint, TensorEntry, open_checkpoint

_MOST_LISTED = 30
# Buffers that old checkpoints carry and every model computes for itself.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True, slots=True)
class _Match:
    entry: TensorEntry
    parameter: nn.Parameter
    shard_id: ShardId


def load_model(model: nn.Module, path: str) -> None:
    """Fill every parameter of `model` from the checkpoint in folder `path`.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit: tensors that match no parameter,
            parameters that no tensor fills and wrong shapes are listed together, by checkpoint name.
    """
    checkpoint = open_checkpoint(path)
    by_file: dict[str, list[_Match]] = defaultdict(list)
    for match in _match(model, checkpoint):
        by_file[str(match.entry.file)].append(match)
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for match in wanted:
                _load_one(match, tensors.get_tensor(match.entry.name))


def load_dummy_weights(model: nn.Module) -> None:
    """Fill every parameter with small random numbers that depend on its name only, norms with ones."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.data.normal_(0.0, 0.02, generator=generator)


def default_weight_loader(parameter: nn.Parameter, loaded_weight: Tensor) -> None:
    """Copy a whole tensor into a parameter of the same shape."""
    parameter.data.copy_(loaded_weight)


def _load_one(match: _Match, tensor: Tensor) -> None:
    if isinstance(match.parameter, ShardedParameter):
        match.parameter.weight_loader(tensor, match.shard_id)
    else:
        default_weight_loader(match.parameter, tensor)


def _match(model: nn.Module, checkpoint: Checkpoint) -> list[_Match]:
    """Pair each tensor with its place in the model, or say all that does not fit."""
    expected, tied = _expected(model), _tied_names(model)
    found = {
        name: entry
        for name, entry in checkpoint.tensors.items()
        if name not in tied and not name.endswith(_IGNORED_SUFFIXES)
    }
    missing = [f"{name} {list(expected[name][2])}" for name in expected.keys() - found.keys()]
    unexpected = [f"{name} {list(found[name].shape)}" for name in found.keys() - expected.keys()]
    misshapen = [
        f"{name}: checkpoint {list(found[name].shape)}, model {list(shape)}"
        for name, (_, _, shape) in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = {
        "in the model but not in the checkpoint": missing,
        "in the checkpoint but not in the model": unexpected,
        "of another shape": misshapen,
    }
    if any(problems.values()):
        raise CheckpointError(_describe(checkpoint, problems))
    return [_Match(found[name], parameter, shard) for name, (parameter, shard, _) in expected.items()]


def _expected(model: nn.Module) -> dict[str, tuple[nn.Parameter, ShardId, tuple[int, ...]]]:
    """Name every checkpoint tensor that the model needs, with its parameter, shard id and whole shape."""
    mapping: Mapping[str, tuple[str, ShardId]] = getattr(model, "packed_modules_mapping", {})
    unpacked = {(module, shard_id): name for name, (module, shard_id) in mapping.items()}
    expected: dict[str, tuple[nn.Parameter, ShardId, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, ShardedParameter):
            expected[name] = (parameter, None, tuple(parameter.shape))
            continue
        for shard_id, part in parameter.shards.items():
            tensor = name if shard_id is None else _unpacked_name(name, shard_id, unpacked)
            expected[tensor] = (parameter, shard_id, part.full_shape)
    return expected


def _unpacked_name(name: str, shard_id: ShardId, unpacked: Mapping[tuple[str, ShardId], str]) -> str:
    prefix, module, leaf = name.rsplit(".", 2)
    return f"{prefix}.{unpacked[module, shard_id]}.{leaf}"


def _tied_names(model: nn.Module) -> set[str]:
    """Return the second names of shared parameters: a checkpoint may or may not repeat them."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _describe(checkpoint: Checkpoint, problems: Mapping[str, list[str]]) -> str:
    lines = [f"the checkpoint in {checkpoint.folder} does not fit the model of its config.json:"]
    for what, names in problems.items():
        if not names:
            continue
        lines.append(f"  {len(names)} tensors {what}:")
        lines += [f"    {name}" for name in sorted(names)[:_MOST_LISTED]]
        if len(names) > _MOST_LISTED:
            lines.append(f"    and {len(names) - _MOST_LISTED} more")
    return "\n".join(lines)
