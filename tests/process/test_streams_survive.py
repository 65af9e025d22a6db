"""Streams go on as if nothing had happened when workers are killed under them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.chaos import make_deployment
from scripts.chaos_streams import NUM_STREAMS, run_streams

NUM_KILLS = 3
NUM_TOKENS = 150


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("tmpdir_of_children")
def test_sixteen_streams_outlive_their_workers_and_no_token_comes_twice(tmp_path: Path) -> None:
    said: list[str] = []
    report = run_streams(make_deployment(tmp_path), NUM_KILLS, 0, said.append, NUM_TOKENS)
    assert report.errors == []
    assert len(report.kills) == NUM_KILLS
    assert report.num_equal == NUM_STREAMS
    assert report.num_expected == NUM_STREAMS * NUM_TOKENS
    assert (report.num_sent, report.num_tokens) == (report.num_expected, report.num_expected)
