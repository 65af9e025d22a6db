"""Asks a real server for outputs of JSON schemas, and checks that every one parses and validates.

    python scripts/check_structured_output.py 1000
    python scripts/check_structured_output.py 100 CONFIG --clients 8 --set parallel.tensor_parallel_size=1
    python scripts/check_structured_output.py 100 --base-url http://host:8000

Chat answers at temperature 1, each with another seed, over schemas of several kinds in turns: enumerations and
constants, nested arrays and objects, numbers with bounds, patterns, alternatives and references. Strings,
arrays and decimals are bounded in all of them, so that an output that `max_tokens` cuts short is a failure as
well. The validator, jsonschema_rs, shares no code with what makes the grammars. Exits with 1 if anything is not
valid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonschema_rs

from launch.bench.serve_http import HttpClient, HttpError
from launch.bench.serve_run import first_model
from scripts.soak_server import DEMO
from scripts.soak_server_process import ServedDeployment
from scripts.soak_tally import Tally
from scripts.soak_verdict import wait_until

_READY_S = 300.0
_ANSWER_S = 300.0
_MAX_TOKENS = 400
Schema = dict[str, Any]


def _object(properties: Mapping[str, Any], required: Sequence[str] | None = None) -> Schema:
    """Return the schema of an object with no other properties; all are required unless it is said which."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


_WORD = {"type": "string", "maxLength": 20}
_TREE = _object({"name": _WORD, "leaves": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}})
SCHEMAS: Mapping[str, tuple[str, Schema]] = {
    "enumerations": (
        "Which fruit do you like?",
        _object(
            {
                "fruit": {"enum": ["apple", "banana", "cherry"]},
                "size": {"enum": [1, 2.5, None, "large", True]},
                "kind": {"const": "fruit"},
            }
        ),
    ),
    "nested arrays": (
        "Give me a small matrix with its labels.",
        _object(
            {
                "rows": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 3,
                    "items": {
                        "type": "array",
                        "minItems": 2,
                        "maxItems": 2,
                        "items": {"type": "integer", "minimum": -99, "maximum": 99},
                    },
                },
                "labels": {"type": "array", "items": _WORD, "maxItems": 2},
            }
        ),
    ),
    "numbers": (
        "How warm is it today?",
        _object(
            {
                "celsius": {"type": "integer", "minimum": -40, "maximum": 60},
                "share": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
                "above": {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 8},
                "is_sunny": {"type": "boolean"},
            }
        ),
    ),
    "nested objects": (
        "Describe a person who lives in Paris.",
        _object(
            {
                "name": _WORD,
                "age": {"type": "integer", "minimum": 0, "maximum": 130},
                "address": _object({"street": _WORD, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}),
                "nickname": {"type": ["string", "null"], "maxLength": 12},
            },
            required=["name", "address"],
        ),
    ),
    "alternatives": (
        "Write down a circle, or a square.",
        _object(
            {
                "shape": {
                    "anyOf": [
                        _object({"type": {"const": "circle"}, "radius": {"type": "integer", "maximum": 9}}),
                        _object({"type": {"const": "square"}, "side": {"type": "integer", "minimum": 1}}),
                    ]
                },
                "color": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
            }
        ),
    ),
    "references": (
        "Plant two trees.",
        {
            "$defs": {"tree": _TREE},
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {"$ref": "#/$defs/tree"},
        },
    ),
    "text beyond ASCII": (
        "Comment savez-vous dire merci en japonais ?",
        _object({"langue": {"enum": ["français", "日本語", 'with "quotes"\n']}, "mot": _WORD}),
    ),
}


def judge(schema: Schema, text: str, finish_reason: str) -> str | None:
    """Return what is wrong with an output of `schema`; None if it is valid."""
    if finish_reason != "stop":
        return f"ended by {finish_reason}"
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    if not jsonschema_rs.is_valid(schema, value):
        return next(str(error) for error in jsonschema_rs.iter_errors(schema, value))
    return None


async def ask(client: HttpClient, model: str, number: int, tally: Tally) -> None:
    """Ask for output number `number`, which is its seed as well, and note what comes."""
    kind = list(SCHEMAS)[number % len(SCHEMAS)]
    question, schema = SCHEMAS[kind]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{question} Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "max_tokens": _MAX_TOKENS,
        "temperature": 1,
        "seed": number,
    }
    try:
        async with asyncio.timeout(_ANSWER_S):
            response = await client.post("/v1/chat/completions", json.dumps(body).encode())
    except (HttpError, TimeoutError) as error:
        tally.violate(f"{kind}: no answer", f"seed {number}: {error!r}")
        return
    if response.status != 200:
        tally.violate(f"{kind}: HTTP {response.status}", response.body.decode(errors="replace"))
        return
    answer = json.loads(response.body)
    (choice,) = answer["choices"]
    tally.count("tokens", answer["usage"]["completion_tokens"])
    problem = judge(schema, choice["message"]["content"], choice["finish_reason"])
    if problem is None:
        tally.count(f"valid: {kind}")
    else:
        tally.violate(f"{kind}: not valid", f"seed {number}: {problem}: {choice['message']['content']!r}")


async def ask_all(base_url: str, count: int, num_clients: int, tally: Tally) -> None:
    """Ask for `count` outputs, `num_clients` at a time."""
    client = HttpClient(base_url, {})
    await wait_until(client, "/ready", _READY_S)
    model, numbers = await first_model(client), iter(range(count))

    async def ask_on() -> None:
        for number in numbers:
            await ask(client, model, number, tally)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(ask_on())
    client.close()


def run(args: argparse.Namespace) -> Tally:
    """Ask the server that is given, or one that is started for it."""
    tally = Tally()
    if args.base_url:
        asyncio.run(ask_all(args.base_url, args.count, args.clients, tally))
        return tally
    deployment = ServedDeployment(args.config, args.settings or ())
    try:
        asyncio.run(ask_all(deployment.start(), args.count, args.clients, tally))
        deployment.stop()
    finally:
        deployment.close()
    return tally


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, help="outputs")
    parser.add_argument("config", nargs="?", default=DEMO, help="YAML file; the demo's model on two CPU ranks")
    parser.add_argument("--base-url", help="a server that runs already")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--set", dest="settings", action="append", metavar="KEY=VALUE")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the check; return 1 if an output is not valid."""
    started_s = time.monotonic()
    tally = run(parse(sys.argv[1:]))
    print(tally.table())
    print(f"{time.monotonic() - started_s:.0f} s")
    return int(bool(tally.violations))


if __name__ == "__main__":
    sys.exit(main())
