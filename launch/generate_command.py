"""`tprt generate`: text from prompts on the command line, on the processes of one deployment."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.config_file import load_config
from launch.llm import LLM
from launch.options import (
    ConfigArgument,
    SetOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    chosen_sampling,
)
from launch.torchrun_options import with_torchrun_options
from tprt.errors import ConfigError, InvalidRequestError
from tprt.messages import Grammar, SamplingParams
from tprt.server.completion import Completion
from tprt.server.engine_client import are_token_ids


@with_torchrun_options
def generate(
    config: ConfigArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3", help="A prompt as token ids; repeatable.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A file with one prompt; - is standard input; repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Send each text as a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each prompt.")] = 128,
    ignore_eos: Annotated[bool, typer.Option(help="Go on past the end-of-sequence token.")] = False,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    presence_penalty: Annotated[float, typer.Option(help="Off the logit of what is in the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time it is there.")] = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: rather not what was there; left out: the model's.")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="The output fits this JSON schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The output matches this, as a whole.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Go on past end tokens up to this many.")] = 0,
    stop: StopOption = None,
    logprobs: Annotated[int | None, typer.Option(help="Report this many most likely tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line and prompt.")] = False,
    set_: SetOption = None,
) -> None:
    """Generate text from prompts and print it, in the order of the prompts."""
    settings = load_config(config, set_ or ())
    chosen = chosen_sampling(
        settings.model,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    sampling = SamplingParams(
        **asdict(chosen),
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        grammar=_to_grammar(json_schema, regex),
    )
    texts = list(prompt or ()) + [_read_prompt(file) for file in prompt_file or ()]
    ids = [_parse_ids(text) for text in prompt_ids or ()]
    if not texts and not ids:
        raise InvalidRequestError("no prompt: give --prompt TEXT, --prompt-ids 1,2,3 or --prompt-file FILE")
    with LLM(settings) as llm:
        shown = _Printer(as_json, has_text=llm.tokenizer is not None)
        _run(llm, [_encode(llm, text, chat) for text in texts] + ids, sampling, shown)
    shown.finish()


def _run(llm: LLM, prompts: list[list[int]], sampling: SamplingParams, shown: _Printer) -> None:
    try:
        llm.run(prompts, [sampling] * len(prompts), True, shown.show)
    finally:
        # Also when a signal has cut it short, and before the processes are ended, which takes a moment.
        shown.print_all()


def _to_grammar(json_schema: str | None, regex: str | None) -> Grammar | None:
    """Return the grammar of `--json-schema`, a file or the schema itself, or of `--regex`.

    Raises:
        InvalidRequestError: there are both.
        ConfigError: the file cannot be read.
    """
    if json_schema is not None and regex is not None:
        raise InvalidRequestError("--json-schema and --regex: an output follows one of them, not both")
    if json_schema is None:
        return None if regex is None else Grammar("regex", regex)
    if json_schema.lstrip().startswith("{"):
        return Grammar("json_schema", json_schema)
    try:
        return Grammar("json_schema", Path(json_schema).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json-schema {json_schema} cannot be read: {error}") from error


def _encode(llm: LLM, text: str, chat: bool) -> list[int]:
    if chat:
        return llm.encode_chat([{"role": "user", "content": text}])
    return llm.encode(text)


def _read_prompt(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {file} cannot be read: {error}") from error


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(token) for token in text.split(",")]
    except ValueError:
        ids = []
    # Whether the vocabulary has them is known once the model is.
    if not are_token_ids(ids):
        raise InvalidRequestError(
            f"--prompt-ids {text!r}: expected token ids from 0 on, separated by commas, as in 1,2,3"
        )
    return ids


class _Printer:
    """Prints each completion as it ends; a prompt that was refused does not stop the others.

    On a terminal that shows a progress bar as well, the text waits until the bar is gone. Where there is none,
    for want of a tokenizer, token ids are printed.
    """

    def __init__(self, as_json: bool, has_text: bool) -> None:
        self._as_json = as_json
        self._has_text = has_text
        self._waits = sys.stdout.isatty() and sys.stderr.isatty()
        self._lines: list[str] = []
        self._errors: list[str] = []

    def show(self, index: int, completion: Completion) -> None:
        if completion.error is not None:
            self._errors.append(f"prompt {index + 1}: {completion.error}")
        if self._as_json:
            self._lines.append(json.dumps(_to_json(completion), ensure_ascii=False))
        elif completion.error is None:
            ids = ",".join(map(str, completion.token_ids))
            self._lines.append(completion.text if self._has_text else ids)
        if not self._waits:
            self.print_all()

    def print_all(self) -> None:
        """Print what has waited."""
        for line in self._lines:
            print(line, flush=True)
        self._lines.clear()

    def finish(self) -> None:
        """Raise an error if any prompt was refused.

        Raises:
            InvalidRequestError: lists them.
        """
        if self._errors:
            raise InvalidRequestError("\n".join(self._errors))


def _to_json(completion: Completion) -> dict[str, object]:
    if completion.error is not None:
        return {"error": completion.error, "prompt_tokens": len(completion.prompt_token_ids)}
    entry: dict[str, object] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": len(completion.prompt_token_ids),
        "cached_tokens": completion.num_cached_tokens,
        "finish_reason": completion.finish_reason,
    }
    if completion.sampling.logprobs is not None:
        entry["logprobs"] = [
            {"token_id": t.token_id, "logprob": t.logprob, "top": _top(t.top)} for t in completion.logprobs
        ]
    return entry


def _top(top: Sequence[tuple[int, float]]) -> list[dict[str, float]]:
    return [{"token_id": token_id, "logprob": logprob} for token_id, logprob in top]
