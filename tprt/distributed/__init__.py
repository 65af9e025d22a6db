"""Tensor-parallel groups of ranks and the collectives that connect them."""

from tprt.distributed.factory import GroupDeadlines, make_group
from tprt.distributed.torch_collectives import TcpMeeting
from tprt.distributed.tp_group import Collectives, TPGroup
from tprt.distributed.tuning import tune_all_reduce

__all__ = ["Collectives", "GroupDeadlines", "TPGroup", "TcpMeeting", "make_group", "tune_all_reduce"]
