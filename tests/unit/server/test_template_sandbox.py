"""A template can refuse, fail or run wild, and the caller gets an error."""

from __future__ import annotations

import pytest

from tprt.errors import InvalidRequestError
from tprt.server import template_sandbox
from tprt.server.template_sandbox import SandboxedTemplate

DOUBLE = "{% set n = namespace(x='ab') %}{% for i in range(99) %}"


def render(source: str, **variables: object) -> str:
    return SandboxedTemplate(source).render(variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(3) %}{{ i }}{% if loop.last %}!{% endif %}{% endfor %}", "012!"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for k, v in d.items() if v %}{{ k ~ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for x in missing %}{{ x }}{% else %}none{% endfor %}", "none"),
        ("{% for x in [1, [2, 3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m(2) }}", "<a><2>"),
        ("{% set x %}{{ 1 + 2 * 3 ** 2 % 5 }}{% endset %}{{ x | trim }}", "4"),
        ("{% set x | upper %}a{% endset %}{{ x }}{% filter upper %}b{% endfilter %}", "AB"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ {'a': '<ü>'} | tojson }}{{ [1] | tojson(separators=(',', ':')) }}", '{"a": "<ü>"}[1]'),
        ("{{ '%s is %02d' % ('a', 3) }}{{ 'x' * 3 }}{{ [0] * 2 }}", "a is 03xxx[0, 0]"),
        ("{{ '\\n'.join(d.keys() | list) }}{{ 'ab'[::-1] }}", "a\nbba"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_what_templates_do_is_done(source: str, text: str) -> None:
    assert render(source, d={"a": 1, "b": 0}) == text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ d.update({'b': 1}) }}", "unsafe"),
        ("{{ 'a' + none }}", "concatenate"),
        ("{{ missing.deeper }}", "undefined"),
        ("{{ d['a']['b'] + 1 }}", "no attribute 'b'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ [1] | first | int('x', 99) ~ 'a'.index('b') }}", "substring not found"),
    ],
)
def test_an_error_in_a_template_is_one_of_the_request(source: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"the chat template refuses these messages: .*{words}"):
        render(source, d={"a": 1})


@pytest.mark.parametrize("source", ["{% for %}", "{{ a", "{% nothing %}", "{{ a | nothing }}"])
def test_what_is_no_template_says_so(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template of this checkpoint is broken"):
        SandboxedTemplate(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "does not end"),
        (
            "{% for i in range(99) recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
            "does not end",
        ),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
            "does not end",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        (DOUBLE + "{% set n.x = n.x ~ n.x %}{% endfor %}", "text or list of"),
        (DOUBLE + "{% set n.x = n.x + n.x %}{% endfor %}", "text or list of"),
        (DOUBLE + "{% set n.x = [n.x, n.x] | join %}{% endfor %}", "text or list of"),
        (DOUBLE + "{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}", "text or list of"),
        (DOUBLE + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}", "text or list of"),
        (
            DOUBLE + "{% set y | upper %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
            "text or list of",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "text or list",
        ),
        ("{{ 'a' * 999999999 }}", "text or list of"),
        ("{{ 999999999 * [0] }}", "text or list of"),
        ("{{ 9 ** 9999 }}", "a number of"),
        (
            "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "a number of",
        ),
        ("{{ '%999999999d' % 1 }}", "formats with"),
        ("{{ '%*d' % (999999999, 1) }}", "formats with"),
        ("{{ lipsum(999999) }}", "undefined"),
        ("{% for i in range(9999) %}{{ 'abcdefghij' * 10000 }}{% endfor %}", "text or list of"),
    ],
)
def test_a_template_that_runs_wild_is_ended(source: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_ROUNDS", 50_000)
    monkeypatch.setattr(template_sandbox, "MAX_LENGTH", 1_000_000)
    with pytest.raises(InvalidRequestError, match=words):
        render(source)


def test_every_render_has_all_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_ROUNDS", 50)
    template = SandboxedTemplate("{% for i in range(40) %}{% endfor %}done")
    assert [template.render({}) for _ in range(3)] == ["done"] * 3
