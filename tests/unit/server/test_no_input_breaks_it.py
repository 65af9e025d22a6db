"""Whatever fits the server's own description of itself, and much that does not, is answered without a 500."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode

from tests.support.fake_server import CHAT, COMPLETIONS, make_context
from tprt.server.http.app import make_app
from tprt.server.tokenizer import Tokenizer

BOUNDS = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(byte_tokenizer: Tokenizer) -> schemathesis.BaseSchema:
    engine, context = make_context(byte_tokenizer)
    engine.answer = lambda prompt, sampling: "x"
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(context))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_input_breaks_the_server(schema: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    statuses: Counter[int] = Counter()
    paths = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue

        @BOUNDS
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            if isinstance(case.body, dict):
                # Another model would be all that is wrong with it.
                case.body.pop("model", None)
            response = case.call()
            if case.method == "POST":
                statuses[response.status_code] += 1
            assert response.status_code < 500, response.text

        ask()
        paths.add(operation.path)
    assert {CHAT, COMPLETIONS, "/tokenize", "/detokenize"} <= paths
    # Otherwise nothing would have come past the door.
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] >= 10, statuses
