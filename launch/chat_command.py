"""`tprt chat`: a conversation in the terminal, on the processes of one deployment.

Answers go to standard output and everything else to standard error, so that lines can be piped through it.
"""

from __future__ import annotations

import io
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from launch.chat_session import ChatSession
from launch.checkpoint_tokenizer import open_tokenizer
from launch.config_file import load_config
from launch.deployment import Deployment
from launch.options import (
    ConfigArgument,
    SetOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    chosen_sampling,
)
from tprt.config import Config
from tprt.errors import CheckpointError, InvalidRequestError
from tprt.messages import SamplingParams
from tprt.server.tokenizer import Tokenizer

_HELP = """\
/clear         forget what was said
/system TEXT   put TEXT before the conversation; without TEXT: nothing
/help          show this
/exit          leave; so does the end of input (Ctrl-D)
Ctrl-C stops an answer."""


def chat(
    config: ConfigArgument,
    system: Annotated[str, typer.Option(help="What to tell the model before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    stop: StopOption = None,
    set_: SetOption = None,
) -> None:
    """Talk with the model, a line at a time; /help lists what else a line can be."""
    settings = load_config(config, set_ or ())
    chosen = chosen_sampling(settings.model, temperature=temperature, top_k=top_k, top_p=top_p)
    sampling = SamplingParams(**asdict(chosen), seed=seed, max_tokens=max_tokens, stop=tuple(stop or ()))
    tokenizer = _open_tokenizer(settings)
    with Deployment(settings) as deployment:
        deployment.start()
        client = deployment.connect(tokenizer)
        try:
            deployment.wait_until_ready(client)
            session = ChatSession(deployment, client, tokenizer, sampling)
            session.set_system(system)
            _converse(session)
        finally:
            if not deployment.has_failed:
                deployment.expect_end()
                client.shut_down("the conversation is over")
            client.close(flush=not deployment.has_failed)


def _open_tokenizer(settings: Config) -> Tokenizer:
    tokenizer = open_tokenizer(settings.model.path)
    if tokenizer is None or not tokenizer.has_chat_template:
        lacking = "tokenizer.json" if tokenizer is None else "chat template"
        raise CheckpointError(f"{settings.model.path} has no {lacking}, which a conversation needs")
    return tokenizer


def _converse(session: ChatSession) -> None:
    """Take lines and answer them until the input ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (editing and history of input lines)

        _note(f"the context holds {session.max_tokens} tokens; /help lists commands")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
            if line == "/exit":
                return
            _take_line(session, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("\n/exit or Ctrl-D leaves")
        except InvalidRequestError as error:
            _note(f"tprt: {error}")


def _take_line(session: ChatSession, line: str) -> None:
    command, _, text = line.partition(" ")
    if command == "/clear":
        session.clear()
    elif command == "/system":
        session.set_system(text.strip())
    elif command == "/help":
        _note(_HELP)
    elif command.startswith("/"):
        _note(f"there is no command {command}\n{_HELP}")
    elif line:
        why_cut = session.answer(line, _show)
        print(flush=True)
        if why_cut:
            _note(f"({why_cut})")


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
