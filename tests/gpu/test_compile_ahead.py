"""After a rehearsal nothing is left to compile: not in the start, and not in the first requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config_file import show
from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import make_config

pytestmark = pytest.mark.gpu

# A start with nothing compiled, on few cores.
DEADLINE_S = 110.0


@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [
        ("float32", TinyModel("llama", 9, 3, bias=True, head_dim=16)),
        ("bfloat16", TinyModel("qwen3", 8, 2, tied=True, head_dim=16, vocab_size=208)),
    ],
)
def test_a_start_with_nothing_compiled_compiles_only_what_was_rehearsed(
    tmp_path: Path, dtype: str, tiny: TinyModel
) -> None:
    save_tiny(tmp_path, tiny)
    config = make_config(
        tmp_path, num_blocks=None, device="cuda", memory_fraction=0.3, max_num_batched_tokens=128
    )
    changed = {
        "model": config.model.model_copy(update={"dtype": dtype}),
        "scheduler": config.scheduler.model_copy(update={"max_num_seqs": 100}),
        "runtime": config.runtime.model_copy(update={"attention_backend": "triton", "num_threads": 4}),
    }
    (tmp_path / "deployment.yaml").write_text(show(config.model_copy(update=changed)))
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.late_compiles", str(tmp_path / "deployment.yaml")],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=DEADLINE_S,
    )
    report = json.loads(found.stdout.splitlines()[-1])
    assert len(report["ahead"]) > 10
    assert report["late_in_start"] == []
    assert report["late_in_requests"] == []
