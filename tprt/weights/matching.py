"""Which checkpoint tensor fills which part of which parameter.

All tensors are matched by name and shape before any byte is read; what does not fit is reported in one error.
A module may name its `packed_modules_mapping`. Knows nothing of how tensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tprt.errors import CheckpointError
from tprt.layers.parameter import ShardedParameter, ShardId, ShardSlice, whole_slice
from tprt.weights.checkpoint import Checkpoint, TensorEntry

_MOST_LISTED = 30
# Buffers that old checkpoints carry and every model computes for itself.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A tensor of the checkpoint and the part of a parameter that it fills."""

    entry: TensorEntry
    parameter: nn.Parameter
    part: ShardSlice


def match_tensors(model: nn.Module, checkpoint: Checkpoint) -> list[Match]:
    """Pair each tensor that `model` needs with its place there.

    Raises:
        CheckpointError: lists tensors that match no parameter, parameters that no tensor fills and wrong
            shapes, by checkpoint name.
    """
    expected, tied = _expected(model), _tied_names(model)
    found = {
        name: entry
        for name, entry in checkpoint.tensors.items()
        if name not in tied and not name.endswith(_IGNORED_SUFFIXES)
    }
    missing = [f"{name} {list(expected[name][1].full_shape)}" for name in expected.keys() - found.keys()]
    unexpected = [f"{name} {list(found[name].shape)}" for name in found.keys() - expected.keys()]
    misshapen = [
        f"{name}: checkpoint {list(found[name].shape)}, model {list(part.full_shape)}"
        for name, (_, part) in expected.items()
        if name in found and found[name].shape != part.full_shape
    ]
    problems = {
        "in the model but not in the checkpoint": missing,
        "in the checkpoint but not in the model": unexpected,
        "of another shape": misshapen,
    }
    if any(problems.values()):
        raise CheckpointError(_describe(checkpoint, problems))
    return [Match(found[name], parameter, part) for name, (parameter, part) in expected.items()]


def _expected(model: nn.Module) -> dict[str, tuple[nn.Parameter, ShardSlice]]:
    """Name every checkpoint tensor that the model needs, with its parameter and its part of it."""
    mapping: Mapping[str, tuple[str, ShardId]] = getattr(model, "packed_modules_mapping", {})
    unpacked = {(module, shard_id): name for name, (module, shard_id) in mapping.items()}
    expected: dict[str, tuple[nn.Parameter, ShardSlice]] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, ShardedParameter):
            expected[name] = (parameter, whole_slice(tuple(parameter.shape)))
            continue
        for shard_id, part in parameter.shards.items():
            tensor = name if shard_id is None else _unpacked_name(name, shard_id, unpacked)
            expected[tensor] = (parameter, part)
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
