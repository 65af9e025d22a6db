"""How tokens are chosen where a request does not say: as the checkpoint's generation_config.json says.

Of that file it reads what vLLM reads, and `do_sample`. Knows nothing of how a request comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tprt.checkpoint_config import GENERATION_CONFIG, read_generation_config
from tprt.config import ModelConfig
from tprt.errors import CheckpointError, InvalidRequestError
from tprt.messages import SamplingParams

_ADVICE = "correct the file, or do without it: model.generation_config=tprt"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The sampling parameters of a request that names none of them; as they come, they are OpenAI's.

    Attributes: those of `SamplingParams`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def with_given(self, **given: float | None) -> SamplingDefaults:
        """Return these with the values of a request in their place, where it has one that is not None."""
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **known)

    def changes(self) -> str:
        """Return what is other than OpenAI's defaults, as `name=value`; empty if nothing is."""
        plain = asdict(SamplingDefaults())
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items() if value != plain[name])


def read_sampling_defaults(model: ModelConfig, temperature: float = 1.0) -> SamplingDefaults:
    """Return the defaults of the model's checkpoint.

    Args:
        model: its folder, and whether its file counts.
        temperature: where the file does not say.

    Raises:
        CheckpointError: the file cannot be read, or has a value that is no sampling parameter.
    """
    raw = {} if model.generation_config == "tprt" else read_generation_config(model.path)
    place = Path(model.path) / GENERATION_CONFIG
    found: dict[str, Any] = {
        field.name: number
        for field in fields(SamplingDefaults)
        if (number := _number(raw, field.name, place)) is not None
    }
    # transformers writes -1 and 0 for all tokens.
    found["top_k"] = max(0, found.get("top_k", 0))
    does_sample = raw.get("do_sample")
    if not (does_sample is None or isinstance(does_sample, bool)):
        raise CheckpointError(f"{place}: do_sample is {does_sample!r}; expected true or false; {_ADVICE}")
    if does_sample is False:
        found["temperature"] = 0.0
    elif "temperature" not in found:
        found["temperature"] = 1.0 if does_sample else temperature
    try:
        SamplingParams(**found)
    except InvalidRequestError as error:
        raise CheckpointError(f"{place}: {error}; {_ADVICE}") from None
    return SamplingDefaults(**found)


def _number(raw: Mapping[str, Any], name: str, place: Path) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    kinds = int if name == "top_k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "a whole number" if name == "top_k" else "a number"
        raise CheckpointError(f"{place}: {name} is {value!r}; expected {expected}, or null; {_ADVICE}")
    return value if name == "top_k" else float(value)
