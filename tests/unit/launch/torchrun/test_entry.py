"""What a process that torchrun has started says of a failure is not lost to the signal that follows it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launch.torchrun.entry import enter, give_way, run_command
from tprt.errors import EngineDeadError, PeerLostError


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [(EngineDeadError("rank 1 is gone"), 1, "tprt: rank 1 is gone\n"), (ValueError(), 143, "")],
)
def test_a_failure_that_a_signal_has_cut_short_is_told(
    failure: Exception,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> None:
        try:
            raise failure
        finally:
            raise SystemExit(143)

    monkeypatch.setattr("launch.cli.main", fail)
    with pytest.raises(SystemExit) as end:
        run_command([])
    assert (end.value.code, capsys.readouterr().err) == (code, told)


@pytest.mark.parametrize(
    ("error", "recorded"), [(ValueError("odd"), ["ValueError: odd"]), (PeerLostError("rank 1 is gone"), [])]
)
def test_torchrun_is_told_of_a_ranks_own_error_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, recorded: list[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    give_way(error)
    found = [json.loads(path.read_text())["message"] for path in tmp_path.iterdir()]
    assert [content["message"] for content in found] == recorded
    assert len(waited) == 1


def test_a_process_that_no_launcher_has_started_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as end:
        enter(["--config", "x.yaml"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("tprt: WORLD_SIZE is not set: start this with torchrun")
