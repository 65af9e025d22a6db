"""/tokenize, /detokenize and /v1/models have the shapes that clients know."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from tests.support.fake_server import END, MAX_MODEL_LEN, MODEL, FakeServer, fake_server, save_byte_tokenizer
from tprt.server.tokenizer import Tokenizer


def test_a_text_is_tokenized(server: FakeServer, byte_tokenizer: Tokenizer) -> None:
    answer = server.client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert answer == {
        "count": 2,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": byte_tokenizer.encode("ab"),
        "token_strs": ["a", "b"],
    }


def test_a_conversation_is_tokenized_as_a_chat_request_is(server: FakeServer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = server.client.post("/tokenize", json={"messages": messages}).json()
    server.chat("Hi")
    assert answer["tokens"] == server.engine.submitted[0][0]
    assert answer["token_strs"] is None


def test_the_beginning_of_the_answer_can_be_left_out(server: FakeServer, byte_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    fields = {"messages": messages, "add_generation_prompt": False}
    without = byte_tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert server.client.post("/tokenize", json=fields).json()["tokens"] == without
    server.chat("Hi", add_generation_prompt=False)
    assert server.engine.submitted[0][0] == without


def test_special_tokens_around_a_text_can_be_left_out(tmp_path: Path) -> None:
    file = save_byte_tokenizer(tmp_path) / "tokenizer.json"
    fast = FastTokenizer.from_file(str(file))
    fast.post_processor = TemplateProcessing(single=f"{END} $0", special_tokens=[(END, 256)])
    fast.save(str(file))
    tokenizer = Tokenizer(str(tmp_path))
    with fake_server(tokenizer) as server:
        for fields, prompt in (({}, f"{END}ab"), ({"add_special_tokens": False}, "ab")):
            expected = tokenizer.encode(prompt, add_special_tokens=False)
            assert server.client.post("/tokenize", json={"prompt": "ab", **fields}).json()["tokens"] == expected
            server.complete(prompt="ab", **fields)
            assert server.engine.submitted[-1][0] == expected


def test_a_long_text_is_tokenized_alike(server: FakeServer) -> None:
    text = "word " * 4000
    assert server.client.post("/tokenize", json={"prompt": text}).json()["count"] == len(text)


def test_token_ids_become_text_again(server: FakeServer, byte_tokenizer: Tokenizer) -> None:
    tokens = byte_tokenizer.encode("né ✓")
    assert server.client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "né ✓"}


def test_exactly_one_of_prompt_and_messages_is_needed(server: FakeServer) -> None:
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        assert server.client.post("/tokenize", json=body).status_code == 400


def test_the_model_is_listed_and_found_by_its_name(server: FakeServer) -> None:
    (model,) = server.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", MAX_MODEL_LEN)
    assert server.client.get(f"/v1/models/{MODEL}").json() == model
    missing = server.client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
