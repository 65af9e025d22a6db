"""Reading checkpoints: which tensors a folder holds, and filling a model's parameters from them."""

from tprt.weights.checkpoint import Checkpoint, open_checkpoint
from tprt.weights.loader import default_weight_loader, load_dummy_weights, load_model

__all__ = ["Checkpoint", "default_weight_loader", "load_dummy_weights", "load_model", "open_checkpoint"]
