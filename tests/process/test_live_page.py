"""The live page of a real server, in a real browser, from the start of the ranks over their replacement."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

from tests.support.browsing import ARGUMENTS, CHROMIUM, visit
from tests.support.checkpoints import TinyModel
from tests.support.deployments import TinyDeployment, make_tiny_deployment
from tests.support.serving import Served, save_word_tokenizer, tokens_of

pytestmark = [
    pytest.mark.usefixtures("tmpdir_of_children"),
    pytest.mark.skipif(
        not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}; apt-get install chromium brings it"
    ),
]
NUM_TOKENS = 800
EOS = 0
WAIT_MS = 60_000


@pytest.fixture
def chatty(tmp_path: Path) -> TinyDeployment:
    """A tiny deployment that can be talked to in words that are its tokens."""
    model = TinyModel(heads=9, kv_heads=3)
    made = make_tiny_deployment(tmp_path, model, 4096)
    save_word_tokenizer(tmp_path, model.vocab_size)
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return made


def cell(page: Page, rank: int, column: str) -> str:
    names = page.locator("#ranks th").all_inner_texts()
    return page.locator("#ranks tbody tr").nth(rank).locator("td").nth(names.index(column)).inner_text()


def samples_of(served: Served) -> dict[str, float]:
    """Return every sample of /metrics without further labels, and those by finish reason."""
    connection = served.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        f"{sample.name} {sample.labels.get('finished_reason', '')}".strip(): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "rank" not in sample.labels and "le" not in sample.labels
    }


def test_a_kill_in_the_middle_of_an_answer_is_a_pause_that_the_page_explains(chatty: TinyDeployment) -> None:
    prompt = [5, 6, 7]
    expected = chatty.expected(prompt, NUM_TOKENS)
    assert EOS not in expected, "the model would stop by itself"
    with sync_playwright() as playwright, Served(chatty.config) as served:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        shown = visit(browser, f"http://{served.host}:{served.port}")
        page, status = shown.page, shown.page.get_by_role("status")
        expect(status).to_have_text("the ranks are not ready yet")
        expect(status).to_have_text("serving", timeout=WAIT_MS)
        assert [cell(page, rank, "phase") for rank in range(2)] == ["idle", "idle"]

        page.get_by_label("Most tokens").fill(str(NUM_TOKENS))
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Message").fill(" ".join(f"w{token}" for token in prompt))
        page.get_by_label("Message").press("Enter")
        answer = page.locator(".message.assistant p")
        expect(answer).to_have_text(re.compile(r"w\d+ w\d+"))
        os.kill(int(cell(page, 1, "pid")), signal.SIGKILL)
        assert len(tokens_of(answer.inner_text())) < NUM_TOKENS
        replaced = page.locator("#tiles div", has=page.get_by_text("epoch", exact=True)).locator("dd")
        expect(replaced).to_have_text("1", timeout=WAIT_MS)
        expect(page.get_by_text(f"{NUM_TOKENS} tokens, first words after")).to_be_visible(timeout=WAIT_MS)
        assert tokens_of(answer.inner_text()) == expected
        expect(status).to_have_text("serving")
        shown.assert_clean()

        # What the engine says of itself is up to a second old.
        served.wait_until(lambda: samples_of(served)["tprt_sampled_tokens_total"] == NUM_TOKENS)
        samples = samples_of(served)
        assert samples["tprt_restarts_total"] == 1
        assert samples["vllm:generation_tokens_total"] == NUM_TOKENS
        assert samples["vllm:prompt_tokens_total"] == len(prompt)
        assert samples["vllm:request_success_total length"] == 1
        assert samples["vllm:request_queue_time_seconds_count"] == 1
        browser.close()
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0, served.lines
