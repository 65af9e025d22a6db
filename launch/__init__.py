"""The edge of tprt: command line, YAML, environment, and the processes of a deployment.

`LLM` and `SamplingParams` are what a Python program needs; they are imported when first asked for, since
every worker process imports this package too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.llm import LLM
    from tprt.messages import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from launch.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tprt.messages import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
