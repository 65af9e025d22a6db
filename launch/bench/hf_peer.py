"""transformers' `generate` behind a pipe, for `tprt bench compare-hf`: one JSON line in, seconds out."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Serve requests from standard input until it ends."""
    folder, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = torch.tensor(request["prompts"])
        new_tokens = request["new_tokens"]
        started_s = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
            )
        print(time.perf_counter() - started_s, flush=True)


if __name__ == "__main__":
    main()
