"""Loading is seen from outside: records in a JSON log, a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import load_progress
from launch.load_progress import LoadProgress
from tprt.config import LoggingConfig
from tprt.transport.heartbeat import HeartbeatReader, HeartbeatWriter
from tprt.transport.heartbeat_file import create_heartbeats


@pytest.fixture
def beats(tmp_path: Path) -> Path:
    create_heartbeats(tmp_path / "beats", 2)
    return tmp_path / "beats"


def test_a_json_log_has_the_bytes_of_every_rank_as_they_come(
    beats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_progress, "_BETWEEN_RECORDS_S", 0.0)
    ranks = [HeartbeatWriter.open(beats, rank) for rank in range(2)]
    with LoadProgress(LoggingConfig(format="json"), [lambda: HeartbeatReader.open(beats)]) as progress:
        for done in (100, 250):
            ranks[0].on_progress(done, 400)
            ranks[1].on_progress(50, 300)
            progress.update()
            progress.update()
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["done_bytes"] for record in records] == [150, 300]
    assert [record["by_rank"] for record in records] == [[100, 50], [250, 50]]
    assert {record["total_bytes"] for record in records} == {700}
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("logging", [LoggingConfig(), LoggingConfig(format="json", level="warning")])
def test_nothing_is_written_where_nobody_asked_for_it(
    beats: Path, capsys: pytest.CaptureFixture[str], logging: LoggingConfig
) -> None:
    with LoadProgress(logging, [lambda: HeartbeatReader.open(beats)]) as progress:
        progress.update()
    assert capsys.readouterr().err == ""


def test_before_there_are_heartbeats_there_is_nothing_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadProgress(LoggingConfig(format="json"), [lambda: None]) as progress:
        progress.update()
    assert capsys.readouterr().err == ""
