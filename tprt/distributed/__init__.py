"""Tensor-parallel groups of ranks and the collectives that connect them."""

from tprt.distributed.factory import make_group
from tprt.distributed.tp_group import Collectives, TPGroup

__all__ = ["Collectives", "TPGroup", "make_group"]
