"""/tokenize, /detokenize and /v1/models have the shapes that clients know."""

from __future__ import annotations

from tests.support.fake_server import MAX_MODEL_LEN, MODEL, FakeServer
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
