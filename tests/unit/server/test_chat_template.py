"""Messages become prompts as the checkpoint's template says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support import trained_tokenizers as trained
from tprt.errors import InvalidRequestError
from tprt.server.tokenizer import Tokenizer

DEMO = Path(".models/SmolLM2-135M-Instruct")
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
# The parts of Qwen's and Llama 3.1's templates that matter for tools, in their words.
HERMES = """\
{%- if tools %}<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}[assistant]
{%- if message.content %}{{ message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}
{%- elif message.role == "tool" %}<tool_response>{{ message.content }}</tool_response>
{%- else %}[{{ message.role }}]{{ message.content }}{% endif %}
{%- endfor %}"""
LLAMA = """\
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}{{ 'Respond in the format {"name": name, "parameters": arguments}' }}
{%- for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}{%- set tool_call = message.tool_calls[0].function %}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
{%- else %}{{ message.content }}{% endif %}{% endfor %}"""
# As DeepSeek-V3's, which adds the arguments to other text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.arguments }}{% endfor %}"
    "{% endfor %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "<now>",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "no"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.save(trained.byte_level(), tmp_path_factory.mktemp("chat"))


def with_template(folder: Path, template: str | list[dict[str, str]], **settings: object) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **settings}))
    return Tokenizer(str(folder))


def render(tokenizer: Tokenizer, *args: Any, **kwargs: Any) -> str:
    return tokenizer.decode(tokenizer.encode_chat(*args, **kwargs))


def test_messages_are_rendered_with_the_template_of_the_checkpoint(folder: Path) -> None:
    tokenizer = with_template(folder, PLAIN)
    assert render(tokenizer, [{"role": "user", "content": "hi"}]) == "[user]hi>"
    assert render(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=False) == "[user]hi"
    assert tokenizer.tool_call_style is None


def test_the_template_in_a_file_of_its_own_comes_first(folder: Path, tmp_path: Path) -> None:
    trained.save(trained.byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render(with_template(tmp_path, "setting"), []) == "file"


def test_content_in_parts_is_text_and_anything_else_is_refused(folder: Path) -> None:
    tokenizer = with_template(folder, PLAIN)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == "[user]a\nb>"
    assert render(tokenizer, [{"role": "assistant", "content": None}]) == "[assistant]>"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.content has a part of type 'image_url'"):
        tokenizer.encode_chat([{"role": "user", "content": image}])


def test_special_tokens_and_further_arguments_are_variables(folder: Path) -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ enable_thinking }}{{ tools is none }}"
    tokenizer = with_template(folder, template, bos_token="B", eos_token={"content": "E"})
    assert render(tokenizer, [], enable_thinking=False) == "BEFalseTrue"


@pytest.mark.parametrize("template", [HERMES, LLAMA])
def test_tools_and_calls_are_rendered_as_in_transformers(folder: Path, template: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.chat_template = template
    # Their users parse the arguments themselves, and content is text.
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    parsed = [CONVERSATION[0], {**CONVERSATION[1], "content": "", "tool_calls": [call]}, CONVERSATION[2]]
    expected = theirs.apply_chat_template(parsed, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert render(with_template(folder, template), CONVERSATION, TOOLS) == expected
    assert "Zürich" in expected
    assert "<now>" in expected


def test_a_template_that_puts_arguments_together_from_text_gets_text(folder: Path) -> None:
    assert render(with_template(folder, TEXT_ARGUMENTS), CONVERSATION) == 'call {"city": "Zürich"}'


def test_arguments_that_are_no_json_object_stay_as_the_model_wrote_them(folder: Path) -> None:
    for arguments in ("{broken", "[1]", ""):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        text = render(with_template(folder, HERMES), [{"role": "assistant", "tool_calls": [call]}])
        assert json.dumps(arguments) in text


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (PLAIN, None),
        (HERMES, "hermes"),
        (LLAMA, "llama"),
        ("<tool_call>\n<function=f>\n<parameter=a>", None),
        ("<tool_call>f\n<arg_key>a</arg_key>", None),
        ([{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": HERMES}], "hermes"),
    ],
)
def test_the_style_of_tool_calls_is_found_in_the_template(
    folder: Path, template: Any, style: str | None
) -> None:
    assert with_template(folder, template).tool_call_style == style


def test_a_template_for_tools_is_taken_where_there_are_tools(folder: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = with_template(folder, both)
    assert render(tokenizer, []) == render(tokenizer, [], []) == "plain"
    assert render(tokenizer, [], TOOLS) == "1"


def test_tags_that_are_tokens_of_their_own_are_known(folder: Path, tmp_path: Path) -> None:
    assert with_template(folder, HERMES).tool_tags == "text"
    trained.save(trained.add_tool_call_tags(trained.byte_level()), tmp_path)
    assert with_template(tmp_path, HERMES).tool_tags == "tokens"


def test_a_checkpoint_without_a_template_says_so(folder: Path) -> None:
    tokenizer = with_template(folder, [])
    assert not tokenizer.has_chat_template
    assert tokenizer.tool_call_style is None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not there")
def test_the_template_of_the_demo_model_renders_as_in_transformers() -> None:
    chats = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n there"}],
    ]
    theirs, ours = AutoTokenizer.from_pretrained(DEMO), Tokenizer(str(DEMO))
    for chat in chats:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.encode_chat(chat) == expected
