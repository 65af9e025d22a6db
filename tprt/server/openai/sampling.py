"""From the fields of a request to the sampling parameters of its sequences.

Knows nothing of prompts beyond their length, and of what a grammar is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tprt.messages import Grammar, SamplingParams
from tprt.server.http.errors import ApiError, invalid
from tprt.server.openai.protocol_common import SamplingFields
from tprt.server.sampling_defaults import SamplingDefaults

_NUM_SEEDS = 2**63
_MAX_BIASES = 1024


def sampling_of(
    fields: SamplingFields,
    max_tokens: int,
    num_logprobs: int | None,
    grammar: Grammar | None,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """Return the parameters of a request's first choice; what it leaves out is as `defaults` say.

    Raises:
        ApiError: a value, or two together, cannot be served.
    """
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(f"min_tokens is {min_tokens}, more than max_tokens, {max_tokens}", "min_tokens")
    chosen = defaults.with_given(
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
    )
    return SamplingParams(
        temperature=float(chosen.temperature),
        top_k=max(0, chosen.top_k),
        top_p=float(chosen.top_p),
        min_p=float(chosen.min_p),
        seed=None if fields.seed is None else fields.seed % _NUM_SEEDS,
        max_tokens=max_tokens,
        ignore_eos=bool(fields.ignore_eos),
        stop=_stop_strings(fields.stop),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        logprobs=num_logprobs,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=float(chosen.repetition_penalty),
        logit_bias=_logit_bias(fields.logit_bias or {}),
        min_tokens=min_tokens,
        grammar=grammar,
    )


def for_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of choice `index` of a prompt: its seed is the request's plus the index.

    What is to be known of the prompt, the first choice brings.
    """
    if index == 0:
        return sampling
    seed = None if sampling.seed is None else (sampling.seed + index) % _NUM_SEEDS
    return replace(sampling, seed=seed, prompt_logprobs=None)


def check_stream_options(fields: SamplingFields) -> None:
    """Refuse options of a stream where there is none, as OpenAI does."""
    if fields.stream_options is not None and not fields.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true", "stream_options")


def num_tokens_to_generate(
    asked: int | None, default: int | None, num_prompt: int, max_model_len: int, param: str
) -> int:
    """Return `max_tokens`: what was asked for, or the default, or (None) what the context leaves.

    Raises:
        ApiError: prompt and output do not fit into the context; names `param`, where the prompt is.
    """
    left = max_model_len - num_prompt
    if left < 1:
        raise _too_long(max_model_len, f"the prompt has {num_prompt} tokens", param)
    if asked is not None and asked > left:
        message = (
            f"the request asks for {num_prompt + asked}: {num_prompt} of the prompt and {asked} of the output"
        )
        raise _too_long(max_model_len, message, param)
    return asked or min(default or left, left)


def _too_long(max_model_len: int, what: str, param: str) -> ApiError:
    message = f"This model's maximum context length is {max_model_len} tokens; {what}. Send or ask for fewer."
    return invalid(message, param, "context_length_exceeded")


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(strings):
        raise invalid("'stop' holds an empty string", "stop")
    return strings


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if len(bias) > _MAX_BIASES:
        raise invalid(f"logit_bias has {len(bias)} entries; {_MAX_BIASES} at most", "logit_bias")
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise invalid(f"logit_bias: the key {key[:40]!r} is no token id", "logit_bias")
    return tuple((int(key), float(value)) for key, value in bias.items())
