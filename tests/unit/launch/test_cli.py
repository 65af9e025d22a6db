"""The command line answers with one message and an exit code that a script can act on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from launch import cli, config_command
from launch.config_file import config_schema, load_config
from launch.exit_codes import EXIT_BAD_INPUT
from tprt import errors

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run_main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tprt", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code if isinstance(end.value.code, int) else 0

    return run_main


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "deployment.yaml"
    path.write_text("model: {path: m}\n")
    return str(path)


def test_the_version_is_that_of_the_package(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{version('tprt')}\n"


def test_what_config_show_prints_loads_back_to_the_same_settings(
    run: Run, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["parallel.tensor_parallel_size=2", "parallel.rank_weights=[80, 48.5]"]
    assert run("config", "show", file, "--set", overrides[0], "--set", overrides[1]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_config(str(tmp_path / "shown.yaml")) == load_config(file, overrides)


def test_config_schema_prints_the_schema_as_json(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "schema") == 0
    assert json.loads(capsys.readouterr().out) == config_schema()


def test_a_checkpoint_that_recommends_what_is_no_sampling_is_told_before_anything_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.serving.command.configure_logging", lambda *settings: None)
    (tmp_path / "generation_config.json").write_text('{"top_p": 2}')
    file = tmp_path / "deployment.yaml"
    file.write_text(f"model: {{path: {tmp_path}}}\nserver: {{port: 0}}\n")
    for command in (["serve", str(file)], ["chat", str(file)], ["generate", str(file), "--prompt", "x"]):
        assert run(*command) == EXIT_BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "generation_config.json: sampling parameter top_p is 2.0; expected above 0, at most 1;" in line


@pytest.mark.parametrize("ids", ["1,x", "", "1,-1", "1,2147483648"])
def test_what_cannot_be_token_ids_is_refused_before_anything_starts(
    run: Run, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: str
) -> None:
    assert run("generate", file, "--prompt-ids", ids, "--set", f"model.path={tmp_path}") == EXIT_BAD_INPUT
    assert f"--prompt-ids {ids!r}: expected token ids from 0 on" in capsys.readouterr().err


def test_traces_without_their_extra_are_refused_before_anything_starts(
    run: Run, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.serving.command.configure_logging", lambda *settings: None)
    monkeypatch.delitem(sys.modules, "tprt.server.http.request_trace", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    endpoint = "server.otlp_traces_endpoint=http://127.0.0.1:4318/v1/traces"
    assert run("serve", file, "--port", "0", "--set", endpoint) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'tprt[otel]'" in line


def test_a_bad_setting_is_one_message_on_standard_error(
    run: Run, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("config", "show", file, "--set", "server.prot=1") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "tprt: --set server.prot=1: there is no setting server.prot; did you mean server.port?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["config", "show"], "Missing argument 'CONFIG'"),
        (["config", "show", "x.yaml", "--bad"], "No such option: --bad"),
        (["config", "schema", "--indent", "x"], "Invalid value for '--indent'"),
        (["doctor", "x.yaml", "--timeout-s", "inf"], "Invalid value for '--timeout-s'"),
        (["bench", "throughput", "x.yaml", "--num-seqs", "0"], "Invalid value for '--num-seqs'"),
        (["bench", "latency", "x.yaml", "--output-len", "1"], "Invalid value for '--output-len'"),
        (["bench", "startup", "x.yaml", "--repeats", "0"], "Invalid value for '--repeats'"),
        (["bench", "compare-hf", "x.yaml", "--repeats", "0"], "Invalid value for '--repeats'"),
        (["bench", "scaling", "x.yaml", "--ranks", "0"], "--ranks 0: expected whole numbers of 1"),
        (["config"], "Usage: tprt config"),
        ([], "Usage: tprt"),
    ],
)
def test_a_command_line_that_makes_no_sense_shows_usage_and_no_traceback(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.CheckpointError("x"), 2),
        (errors.UnsupportedModelError("x"), 2),
        (errors.ShardPlanError("x"), 2),
        (errors.InvalidRequestError("x"), 2),
        (errors.EngineDeadError("x"), 1),
        (errors.TransportTimeoutError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_the_exit_code_says_whose_fault_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch, file: str, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(config_command, "load_config", fail)
    assert run("config", "show", file) == code


def test_an_error_that_is_our_own_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(config_command, "load_config", fail)
    monkeypatch.setattr(sys, "argv", ["tprt", "config", "show", file])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = "import sys, launch.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
