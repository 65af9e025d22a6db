"""A server without a model, for tests of what it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_server import FakeServer, fake_server, save_byte_tokenizer
from tprt.server.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(save_byte_tokenizer(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(scope="session")
def tool_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(save_byte_tokenizer(tmp_path_factory.mktemp("tools"), with_tools=True)))


@pytest.fixture
def server(byte_tokenizer: Tokenizer) -> Iterator[FakeServer]:
    with fake_server(byte_tokenizer) as server:
        yield server


@pytest.fixture
def tool_server(tool_tokenizer: Tokenizer) -> Iterator[FakeServer]:
    with fake_server(tool_tokenizer) as server:
        yield server
