"""Attention backends by name, and the best that works here. A new backend is one file, one line here and one
line of requirements.
"""

from __future__ import annotations

import importlib
from typing import cast

import torch

from tprt.attention.backend import AttentionBackend
from tprt.attention.requirements import REQUIREMENTS, AttentionSetup
from tprt.attention.sdpa import SdpaBackend
from tprt.errors import ConfigError
from tprt.log import get_logger

# Module and class: imported when asked for, since each needs a package of its own.
_BACKENDS = {
    "flash_attn_3": ("tprt.attention.flash_attn_3", "FlashAttention3Backend"),
    "flash_attn": ("tprt.attention.flash_attn", "FlashAttention2Backend"),
    "triton": ("tprt.attention.triton", "TritonBackend"),
    "sdpa": ("tprt.attention.sdpa", "SdpaBackend"),
}
# Where nothing is said: plain torch, which works everywhere.
_ANYWHERE = AttentionSetup(torch.device("cpu"), torch.float32, head_dim=1, block_size=1)


def make_attention_backend(name: str, scale: float, setup: AttentionSetup = _ANYWHERE) -> AttentionBackend:
    """Return the backend `name` (`auto`: the best that works on `setup`) with softmax scale `scale`.

    Raises:
        ConfigError: there is no backend of that name, or it does not work on `setup`; the message says why.
    """
    if name == "auto":
        backend = _best(scale, setup)
    elif name in _BACKENDS:
        backend = _named(name, scale, setup)
    else:
        known = ", ".join(sorted(_BACKENDS))
        raise ConfigError(f"runtime.attention_backend is {name!r}; there are: auto, {known}")
    if setup is not _ANYWHERE:
        get_logger(__name__).info("attention backend: %s", backend.name)
    return backend


def _best(scale: float, setup: AttentionSetup) -> AttentionBackend:
    for name in REQUIREMENTS:
        try:
            return _named(name, scale, setup)
        except ConfigError as error:
            get_logger(__name__).debug("%s", error)
    return SdpaBackend(scale)


def _named(name: str, scale: float, setup: AttentionSetup) -> AttentionBackend:
    requirements = REQUIREMENTS.get(name)
    unmet = None if requirements is None else requirements.unmet(setup)
    if unmet is not None:
        raise ConfigError(f"runtime.attention_backend {name} does not work here: {unmet}, or take auto")
    module, backend_class = _BACKENDS[name]
    try:
        made = getattr(importlib.import_module(module), backend_class)(scale)
    # A shared library that does not fit this torch raises OSError.
    except (ImportError, OSError) as error:
        assert requirements is not None, "plain torch needs no package"
        raise ConfigError(
            f"runtime.attention_backend {name} does not work here: it needs {requirements.package},"
            f" whose import failed ({error}); install it, or take auto"
        ) from error
    return cast(AttentionBackend, made)
