"""What is too long is listed with its place, and what is just short enough is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.check_sizes import MAX_FILE_LINES, MAX_FUNCTION_LINES, main, offenders


def function(num_lines: int, indent: str = "", head: str = "def f():") -> str:
    return f"{indent}{head}\n" + f"{indent}    x = 1\n" * (num_lines - 1)


def write(folder: Path, text: str, name: str = "m.py") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_function_of_the_longest_allowed_length_passes(tmp_path: Path) -> None:
    file = write(tmp_path, function(MAX_FUNCTION_LINES))
    assert list(offenders(file)) == []


@pytest.mark.parametrize("head", ["def f():", "async def f():"])
def test_a_function_one_line_longer_is_listed_with_its_line(tmp_path: Path, head: str) -> None:
    file = write(tmp_path, "\n\n" + function(MAX_FUNCTION_LINES + 1, head=head))
    assert list(offenders(file)) == [f"{file}:3: f has 61 lines; 60 at most"]


def test_decorators_do_not_count(tmp_path: Path) -> None:
    file = write(tmp_path, "@property\n" + function(MAX_FUNCTION_LINES))
    assert list(offenders(file)) == []


def test_methods_and_inner_functions_are_listed_in_the_order_of_lines(tmp_path: Path) -> None:
    method = function(MAX_FUNCTION_LINES + 1, "    ", "def method(self):")
    inner = "def outer():\n" + function(MAX_FUNCTION_LINES + 2, "    ", "def inner():")
    file = write(tmp_path, f"class C:\n{method}\n{inner}")
    assert list(offenders(file)) == [
        f"{file}:2: method has 61 lines; 60 at most",
        f"{file}:64: outer has 63 lines; 60 at most",
        f"{file}:65: inner has 62 lines; 60 at most",
    ]


def test_a_file_of_the_longest_allowed_length_passes_and_one_line_more_does_not(tmp_path: Path) -> None:
    file = write(tmp_path, "x = 1\n" * MAX_FILE_LINES)
    assert list(offenders(file)) == []
    write(tmp_path, "x = 1\n" * (MAX_FILE_LINES + 1))
    assert list(offenders(file)) == [f"{file}:1: the file has 301 lines; 300 at most"]


def test_all_offenders_in_all_folders_are_printed_and_fail_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path, function(MAX_FUNCTION_LINES + 1), "a/deep/m.py")
    second = write(tmp_path, "x = 1\n" * (MAX_FILE_LINES + 1), "b/m.py")
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{first}:1:",
        f"{second}:1:",
    ]


def test_short_code_passes_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, function(10))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


def test_a_check_that_looked_at_nothing_does_not_pass(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 2
