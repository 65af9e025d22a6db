"""The options of `tprt bench serve`, and what it prints."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from dataclasses import replace
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.bench.serve_http import HttpClient
from launch.bench.serve_load import Lengths, RequestForm
from launch.bench.serve_report import Figures, details_of, figures_of, parse_goodput, table
from launch.bench.serve_run import Load, LoadOutcome, find_vocab_size, first_model, run_load
from launch.bench.serve_stream import PATHS, Endpoint, RequestResult
from tprt.errors import ConfigError

_EXIT_OK = 0
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130

VocabSizeOption = Annotated[
    int | None,
    typer.Option(min=0, help="Prompts are drawn from so many token ids; 0: text; else asked of /tokenize."),
]
GoodputOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME:MS", help="Limit of ttft, tpot or e2el; repeatable.")
]
MoreGoodput = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME:MS]...", help="More limits, as vLLM takes them.")
]


def serve(
    base_url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model; else the first of /v1/models.")] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which of the two is driven.")] = "completions",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests that are measured.")] = 1000,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before them, all at once.")] = 1,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt (in text: words).")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each output.")] = 128,
    range_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Lengths differ by up to this share, up and down.")
    ] = 0.0,
    request_rate: Annotated[float, typer.Option(help="Arrivals per second; inf: all at once.")] = float("inf"),
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gamma distribution of pauses: 1 is Poisson, less is in bursts.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests at a time.")] = None,
    temperature: Annotated[float, typer.Option(help="Of all requests; 0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--stop-at-eos", help="Ask for outputs of full length, or not.")
    ] = True,
    vocab_size: VocabSizeOption = None,
    goodput: GoodputOption = None,
    more_goodput: MoreGoodput = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="For one request.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, lengths and arrivals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, as vLLM's result file.")] = False,
    detailed: Annotated[bool, typer.Option("--detailed", help="In it, the times of each request.")] = False,
) -> None:
    """Latency and throughput of any OpenAI-compatible endpoint, in the words of `vllm bench serve`.

    On completions, prompts are random token ids: exact lengths, and nothing for a prefix cache. Latencies are
    from sending on, without the wait for a place under --max-concurrency. Exits with 1 if no request succeeded;
    Ctrl-C shows what has ended so far, and exits with 130.
    """
    if not (request_rate > 0 and burstiness > 0):
        raise ConfigError(f"--request-rate {request_rate}, --burstiness {burstiness}: expected more than 0")
    limits = parse_goodput([*(goodput or ()), *(more_goodput or ())])
    lengths = Lengths(input_len, output_len, range_ratio)
    pace = (request_rate, burstiness, max_concurrency)
    load = Load(num_prompts, lengths, num_warmups, *pace, timeout_s, seed)
    # The server is asked for what is missing.
    form = RequestForm(model or "", endpoint, vocab_size or 0, temperature, ignore_eos)
    client = HttpClient(base_url, {} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    form, outcome = asyncio.run(
        _measure(client, form, load, asks_vocab_size=endpoint == "completions" and vocab_size is None)
    )
    figures = figures_of(outcome.results, outcome.duration_s, limits)
    if as_json:
        print(_as_json(form, load, outcome, figures, detailed))
    else:
        print(table(figures, max_concurrency, request_rate))
    raise typer.Exit(_exit_code(outcome))


async def _measure(
    client: HttpClient, form: RequestForm, load: Load, asks_vocab_size: bool
) -> tuple[RequestForm, LoadOutcome]:
    try:
        if not form.model:
            form = replace(form, model=await first_model(client))
        if asks_vocab_size:
            form = replace(form, vocab_size=await find_vocab_size(client, form.model))
        with _progress() as bar:
            task = bar.add_task("", total=load.num_prompts, failed=0)
            num_failed = 0

            def on_end(result: RequestResult) -> None:
                nonlocal num_failed
                num_failed += bool(result.error_kind)
                bar.update(task, advance=1, failed=num_failed)

            return form, await run_load(client, form, load, on_end)
    finally:
        client.close()


def _progress() -> Progress:
    return Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
        transient=True,
        refresh_per_second=2,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _as_json(form: RequestForm, load: Load, outcome: LoadOutcome, figures: Figures, detailed: bool) -> str:
    details = details_of(outcome.results) if detailed else {}
    return json.dumps(_head(form, load) | figures | details | {"interrupted": outcome.was_interrupted})


def _head(form: RequestForm, load: Load) -> Figures:
    """Return what was measured, under the names of vLLM's result file."""
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai" if form.endpoint == "completions" else "openai-chat",
        "backend": "openai" if form.endpoint == "completions" else "openai-chat",
        "endpoint": PATHS[form.endpoint],
        "model_id": form.model,
        "num_prompts": load.num_prompts,
        "request_rate": load.request_rate if math.isfinite(load.request_rate) else "inf",
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "seed": load.seed,
    }


def _exit_code(outcome: LoadOutcome) -> int:
    if outcome.was_interrupted:
        return _EXIT_INTERRUPTED
    return _EXIT_OK if any(result.is_good for result in outcome.results) else _EXIT_FAILED
