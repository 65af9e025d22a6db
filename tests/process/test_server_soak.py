"""A short soak of the real server, and outputs of JSON schemas: everything that comes is as it must be.

The long ones are scripts/soak_server.py and scripts/check_structured_output.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts import check_structured_output, soak_server
from tests.support.checkpoints import TinyModel
from tests.support.deployments import make_tiny_deployment

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
VOCAB_SIZE = 49152


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with the tokenizer and the chat template of a real one."""
    folder = tmp_path_factory.mktemp("soak")
    deployment = make_tiny_deployment(folder, TinyModel(heads=9, kv_heads=3, vocab_size=VOCAB_SIZE), 512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return deployment.config


@pytest.mark.usefixtures("tmpdir_of_children")
def test_a_soaked_server_is_as_before_and_has_answered_to_the_letter(config: str) -> None:
    options = ("--clients", "24", "--seconds", "5", "--cases", "12", "--max-tokens", "24")
    # The memory of libraries grows for longer than a test may take: only the long soak judges it.
    few_places = ("--set", "scheduler.max_num_seqs=8", "--set", "server.max_queued_requests=2")
    tally = soak_server.run(soak_server.parse([config, *options, *few_places, "--growth-mib", "inf"]))
    assert tally.violations == {}, tally.table()
    counts = tally.counts
    assert counts["streamed, equal to offline"] >= 10
    assert counts["announced 429"] >= 1
    assert counts["left in mid-stream or queue"] + counts["left before the headers"] >= 5
    assert sum(number for kind, number in counts.items() if kind.startswith("refused")) >= 5
    assert counts["checked: all requests ended, all KV blocks free"] == 1
    assert counts["checked: descriptors of server are flat"] == 1
    assert counts["checked: nothing is left behind"] == 1


@pytest.mark.usefixtures("tmpdir_of_children")
def test_outputs_of_json_schemas_parse_and_validate(config: str) -> None:
    count = 2 * len(check_structured_output.SCHEMAS)
    tally = check_structured_output.run(check_structured_output.parse([str(count), config]))
    assert tally.violations == {}, tally.table()
    valid = {kind: number for kind, number in tally.counts.items() if kind.startswith("valid")}
    assert list(valid.values()) == [2] * len(check_structured_output.SCHEMAS)
