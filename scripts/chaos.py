"""Runs every fault in every phase to every process of a deployment, for real, on two CPU ranks.

    python scripts/chaos.py --json                      one line of JSON for each cell
    python scripts/chaos.py --markdown table.md         the tables of docs/reliability.md as well
    python scripts/chaos.py --only 'rank 1/decode/'     cells whose name has this regular expression in it
    python scripts/chaos.py streams --kills 10          16 streams on 3 ranks, workers killed

Exits with 1 when anything is not as it must be. `--rows FILE` keeps each row as it comes, and a second run goes
on from there.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.chaos_cell import run_cell
from scripts.chaos_matrix import Cell, all_cells, why_not_applicable
from scripts.chaos_report import markdown
from scripts.chaos_streams import run_streams
from scripts.chaos_target import Target, run_undisturbed
from scripts.chaos_verdict import head, row
from scripts.checkpoint_shapes import SHAPES
from scripts.make_checkpoint import make_checkpoint

PROMPTS = ([5, 6, 7], [9, 11, 13, 17] * 10)
_SHAPE = replace(
    SHAPES["qwen3-8b"],
    hidden_size=72,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=16,
    vocab_size=199,
)
_YAML = """model: {{path: {folder}, dtype: float32, max_model_len: 2048}}
parallel: {{tensor_parallel_size: 2}}
runtime: {{device: cpu, num_threads: 1}}
cache: {{num_blocks: 512}}
"""

Row = dict[str, Any]


def make_deployment(folder: Path) -> str:
    """Make a tiny checkpoint in `folder`; return the path of its YAML file."""
    make_checkpoint(folder / "model", _SHAPE, "float32", 1, seed=0)
    config = folder / "tiny.yaml"
    config.write_text(_YAML.format(folder=folder / "model"), encoding="utf-8")
    return str(config)


def run_matrix(cells: Sequence[Cell], target: Target, jobs: int) -> Iterator[Row]:
    """Yield a row for each cell as it comes."""
    sensible = [cell for cell in cells if not why_not_applicable(cell)]
    for cell in cells:
        if reason := why_not_applicable(cell):
            yield {**head(cell), "verdict": "n/a", "reason": reason}
    expected = run_undisturbed(target) if sensible else []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_cell, cell, target): cell for cell in sensible}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                result = row(futures[future], future.result(), expected)
                _say(f"[{number}/{len(sensible)}] {_in_words(result)}")
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _in_words(row: Row) -> str:
    noticed = "" if row["detection_s"] is None else f", noticed after {row['detection_s']:.2f} s"
    problems = f": {'; '.join(row['problems'])}" if row["problems"] else ""
    return f"{row['verdict']} {row['cell']} ({row['seconds']:.0f} s{noticed}){problems}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _earlier_rows(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _keep(path: Path | None, row: Row) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def matrix(args: argparse.Namespace) -> int:
    """Run the cells that are asked for; return the exit code."""
    order = [str(cell) for cell in all_cells()]
    rows = {row["cell"]: row for row in _earlier_rows(args.rows)}
    cells = [cell for cell in all_cells() if re.search(args.only, str(cell)) and str(cell) not in rows]
    with tempfile.TemporaryDirectory(prefix="chaos-model-") as folder:
        target = Target(make_deployment(Path(folder)), PROMPTS, args.max_tokens)
        for result in run_matrix(cells, target, args.jobs):
            rows[result["cell"]] = result
            _keep(args.rows, result)
            if args.json:
                print(json.dumps(result), flush=True)
    found = [rows[name] for name in order if name in rows]
    if args.markdown is not None:
        args.markdown.write_text(markdown(found), encoding="utf-8")
    if not args.json:
        print(markdown(found))
    return int(any(row["verdict"] == "bad" for row in found))


def streams(args: argparse.Namespace) -> int:
    """Run the streams; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="chaos-model-") as folder:
        report = run_streams(make_deployment(Path(folder)), args.kills, args.seed, _say)
    print(json.dumps(report.as_json()), flush=True)
    return int(not report.is_good)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["matrix", "streams"], default="matrix")
    parser.add_argument("--only", default="", help="cells whose name, VICTIM/PHASE/FAULT, has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time; each takes two cores for a while")
    parser.add_argument("--max-tokens", type=int, default=24, help="tokens for each of two prompts")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each cell on standard output")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="keep rows there, leave out those that it has"
    )
    parser.add_argument("--kills", type=int, default=10, help="workers that die under the streams")
    parser.add_argument("--seed", type=int, default=0, help="which workers die when")
    args = parser.parse_args()
    # Also then the cells that run are brought to their end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))
    return streams(args) if args.what == "streams" else matrix(args)


if __name__ == "__main__":
    sys.exit(main())
