"""`tprt generate` prints the text of an output, and token ids where there is no tokenizer to make any."""

from __future__ import annotations

import pytest

from launch.generate_command import _Printer
from tprt.messages import FinishReason, SamplingParams
from tprt.server.completion import Completion


@pytest.mark.parametrize(("has_text", "line"), [(True, ""), (False, "7,2")])
def test_an_output_without_text_is_an_empty_line(
    capsys: pytest.CaptureFixture[str], has_text: bool, line: str
) -> None:
    completion = Completion([1], SamplingParams(), token_ids=[7, 2])
    completion.finish(FinishReason.STOP, None)
    _Printer(as_json=False, has_text=has_text).show(0, completion)
    assert capsys.readouterr().out == line + "\n"
