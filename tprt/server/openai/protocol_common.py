"""What requests for chat answers and for completions have in common.

Types are strict, as OpenAI's are: "1" is no number. Fields that are not known are ignored, and null stands for
leaving a field out. Knows nothing of how a request is served.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tprt.messages import MAX_LOGPROBS

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
NumTopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
MAX_CHOICES = 128
_MAX_STOPS = 64


class ProtocolModel(BaseModel):
    """The base of everything that comes as JSON."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True, frozen=True
    )


class StreamOptions(ProtocolModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """One more chunk, the last, with the counts of tokens and no choices."""
    continuous_usage_stats: bool | None = None
    """The counts so far in every chunk."""


class JsonSchemaFormat(ProtocolModel):
    """A schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    """The JSON schema."""
    strict: bool | None = None
    """Accepted and not needed: every schema is held to."""


class ResponseFormat(ProtocolModel):
    """The form of the output."""

    type: Literal["text", "json_object", "json_schema"]
    """text: any; json_object: a JSON object; json_schema: JSON that the schema describes."""
    json_schema: JsonSchemaFormat | None = None
    """For json_schema."""


class StructuredOutputs(ProtocolModel):
    """What the fields guided_* say, by the names that vLLM has for it since 0.12: one of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A JSON schema."""
    regex: str | None = None
    """A regular expression."""
    choice: list[str] | None = None
    """Some texts."""
    grammar: str | None = None
    """A grammar (Lark, as llguidance reads it)."""
    json_object: bool | None = None
    """Any JSON object."""


class SamplingFields(ProtocolModel):
    """How tokens are chosen, when they end, and what form they have.

    What is left out of temperature, top_p, top_k, min_p and repetition_penalty is as the model's
    generation_config.json says, and OpenAI's default where that says nothing.
    """

    model: str | None = None
    """The model's name, as `/v1/models` lists it; none: the one that there is."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Choices for each prompt; choice i is drawn with seed + i."""
    stream: bool | None = None
    """Send tokens as they come."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    temperature: Annotated[float, Field(ge=0, lt=1e4)] | None = None
    """0 takes the most likely token; left out: the model's own, or 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Keep so many of the most likely tokens; 0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the most likely one."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed draws the same tokens."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off the logits of tokens that the output has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off for each time that the output has them."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """Divides the likelihood of tokens of prompt and output."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Added to the logits of tokens; keys are token ids as strings."""
    stop: str | Annotated[list[str], Field(max_length=_MAX_STOPS)] | None = None
    """Strings that end the output and are not part of it."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    """Tokens that end the output."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """The output does not end by itself before it has so many tokens."""
    ignore_eos: bool | None = None
    """Go on past the model's end-of-sequence tokens."""
    response_format: ResponseFormat | None = None
    """The form of the output."""
    guided_json: dict[str, Any] | str | None = None
    """A JSON schema that the output follows."""
    guided_regex: str | None = None
    """A regular expression that the output matches."""
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    """The output is one of these."""
    guided_grammar: str | None = None
    """A grammar (Lark, as llguidance reads it) that the output follows."""
    structured_outputs: StructuredOutputs | None = None
    """The same, by the names of newer versions of vLLM."""
    return_token_ids: bool | None = None
    """Return the ids of the tokens of each choice as well, as vLLM does."""
    user: str | None = None
    """Accepted and ignored."""

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def wants_usage_chunk(self) -> bool:
        """True when a stream ends with a chunk of counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """True when every chunk of a stream has the counts so far."""
        return self.wants_usage_chunk and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )
