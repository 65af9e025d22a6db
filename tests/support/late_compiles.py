"""Starts the only rank of a deployment in this process, runs requests, and tells when kernels were compiled.

    python -m tests.support.late_compiles CONFIG [--set section.key=value ...]

The last line is JSON: `ahead` are the kernels that a rehearsal had compiled, `late_in_start` and
`late_in_requests` those that a launch had to, and `start_s` the seconds to load and to allocate. With an empty
TRITON_CACHE_DIR the start is a cold one.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from launch.config_file import load_config
from tests.support.local_engine import LocalEngine
from tprt.messages import SamplingParams

PROMPT_LENS = (1, 4, 13, 20, 40, 70, 100)
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, top_p=0.9, max_tokens=9, ignore_eos=True),
)


def main() -> None:
    """Read the arguments, start, and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", nargs="*", default=[])
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)

    from triton import knobs

    compiled: dict[bool, list[str]] = {True: [], False: []}

    def note(*, repr: str, is_manual_warmup: bool, **_: Any) -> None:
        compiled[is_manual_warmup].append(repr)

    knobs.runtime.jit_post_compile_hook = note
    started_s = time.monotonic()
    with LocalEngine(config) as engine:
        start_s = time.monotonic() - started_s
        late_in_start = list(compiled[False])
        for sampling in SAMPLINGS:
            for number, length in enumerate(PROMPT_LENS):
                prompt = [3 + (number + place) % 50 for place in range(length)]
                # Alone, and again behind its cached prefix beside a longer one.
                for prompts in ([prompt], [prompt, [*prompt, 7, 8, 9]]):
                    engine.generate(prompts, sampling, checks_blocks=False)
    report = {
        "start_s": round(start_s, 3),
        "ahead": compiled[True],
        "late_in_start": late_in_start,
        "late_in_requests": compiled[False][len(late_in_start) :],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
