"""A program that generates, has nothing to do for a while, and generates again. Started by scripts/chaos.py.

Usage: chaos_client.py NOTES CONFIG MAX_TOKENS PROMPTS [SECTION.KEY=VALUE ...]

PROMPTS is JSON. It notes `reached` in the folder NOTES when it has nothing to do, and waits for `go` there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from launch import LLM, SamplingParams

_IDLE_S = 20.0
_SETTLE_S = 0.5


def main(notes: Path, config: str, max_tokens: int, prompts: list[list[int]], settings: list[str]) -> None:
    """Generate twice, and print the tokens of each prompt as a line of JSON."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    with LLM(config, settings) as llm:
        for turn in range(2):
            for output in llm.generate(prompts, params):
                print(json.dumps({"token_ids": output.outputs[0].token_ids}), flush=True)
            if turn == 0:
                # Rank 0 has answered; the other ranks may still be on their way out of the step.
                time.sleep(_SETTLE_S)
                (notes / "reached").touch()
                deadline_s = time.monotonic() + _IDLE_S
                while not (notes / "go").exists() and time.monotonic() < deadline_s:
                    time.sleep(0.005)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5:])
