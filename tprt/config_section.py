"""What all sections of the settings have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# A deadline: eleven days, since poll(2) counts milliseconds in 31 bits.
Seconds = Annotated[float, Field(gt=0, le=1_000_000)]


class Section(BaseModel):
    """Frozen; refuses unknown keys, and documents each field by the string below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
