"""What a host says of itself when it joins, and what must be alike on all hosts of a deployment.

Knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

_NUM_DIFFERENCES = 3


class HostCard(BaseModel):
    """One host.

    Attributes:
        rdzv_id: which deployment it belongs to.
        node_rank: its number.
        instance: of the process that joins, so that its next connection is told from another process's.
        host: its name.
        version: of tprt.
        settings: those that must be alike, by dotted key.
        checkpoint: digest of the checkpoint's configuration and headers.
        clock_s: what its clock said when it came, in Unix seconds; None before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rdzv_id: str
    node_rank: int
    instance: str
    host: str
    version: str
    settings: dict[str, Any]
    checkpoint: str
    clock_s: float | None = None


def why_refused(own: HostCard, other: HostCard, nnodes: int) -> str:
    """Return why the host of `own`, node rank 0, does not take `other` in; empty if it does."""
    name = f"node rank {other.node_rank}"
    if other.rdzv_id != own.rdzv_id:
        return f"{name} belongs to deployment {other.rdzv_id!r} (hosts.rdzv_id), node rank 0 to {own.rdzv_id!r}"
    if other.version != own.version:
        return f"{name} runs tprt {other.version}, node rank 0 {own.version}: install one version everywhere"
    if not 0 < other.node_rank < nnodes:
        return f"it calls itself {name}; with hosts.nnodes {nnodes}, expected 1 to {nnodes - 1}"
    if differences := list(_differences(own.settings, other.settings, name)):
        more = f" and {len(differences) - _NUM_DIFFERENCES} more" if len(differences) > _NUM_DIFFERENCES else ""
        shown = "; ".join(differences[:_NUM_DIFFERENCES])
        return f"settings differ: {shown}{more}; give all hosts the same"
    if other.checkpoint != own.checkpoint:
        return (
            f"the checkpoint of {name} is another one (config.json and tensor headers have digest"
            f" {other.checkpoint[:12]}, on node rank 0 {own.checkpoint[:12]}); give all hosts the same files"
        )
    return ""


def _differences(own: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Iterator[str]:
    for key in sorted({*own, *other}):
        here, there = own.get(key), other.get(key)
        if here != there:
            yield f"{key} is {there!r} on {name} and {here!r} on node rank 0"
