"""What people are told on standard error is a record where the log is for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from tprt.log import configure_logging, tell


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("tprt")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


def test_people_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("error", "text", "launcher")
    tell("listening")
    assert capsys.readouterr().err == "tprt: listening\n"


def test_programs_are_told_by_a_record_whatever_level_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("error", "json", "launcher")
    tell("the ranks have failed\nfor two reasons", logging.WARNING)
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert (record["process"], record["level"]) == ("launcher", "warning")
    assert record["message"] == "the ranks have failed\nfor two reasons"
