"""Reading checkpoints: which tensors a folder holds, and filling a model's parameters from them."""

from tprt.weights.checkpoint import Checkpoint, open_checkpoint
from tprt.weights.exchange import LoadExchange, join_load_exchange, make_local_exchanges
from tprt.weights.loader import load_dummy_weights, load_model
from tprt.weights.report import LoadReport

__all__ = [
    "Checkpoint",
    "LoadExchange",
    "LoadReport",
    "join_load_exchange",
    "load_dummy_weights",
    "load_model",
    "make_local_exchanges",
    "open_checkpoint",
]
