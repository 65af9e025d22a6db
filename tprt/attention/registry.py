"""Attention backends by name. A new backend is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from tprt.attention.backend import AttentionBackend
from tprt.attention.sdpa import SdpaBackend
from tprt.errors import ConfigError

_BACKENDS: dict[str, Callable[[float], AttentionBackend]] = {SdpaBackend.name: SdpaBackend}


def make_attention_backend(name: str, scale: float) -> AttentionBackend:
    """Return the backend `name` (`auto`: the best there is) with softmax scale `scale`.

    Raises:
        ConfigError: there is no backend of that name.
    """
    chosen = SdpaBackend.name if name == "auto" else name
    if chosen not in _BACKENDS:
        known = ", ".join(sorted(_BACKENDS))
        raise ConfigError(f"runtime.attention_backend is {name!r}; there are: auto, {known}")
    return _BACKENDS[chosen](scale)
