"""Chat templates render as `transformers` renders them, and hostile ones are stopped."""

from __future__ import annotations

import enum
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import realdata

from ruvllm_core.errors import RequestError, TemplateError
from ruvllm_core.model.chat_template import ChatTemplate

USER = [{"role": "user", "content": 'Hi <there> & "you" é 😀'}]
CHAT = [
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Hello! "},
    {"role": "user", "content": "Why?"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
CALLS = [
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
        ],
    },
    {"role": "tool", "name": "weather", "content": '{"sky": "clear"}'},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & later.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == loop_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
DIALECT = """{% macro show(m, mark='#') -%}
  {{ mark }}{{ m.role | upper }}: {{ m['content'] | trim | replace('e', 'E') }}
{%- endmacro %}
{% set ns = namespace(seen=[], total=0) %}
  {# a comment #}
    {% for m in messages[::-1] %}
        {% if m.role == 'system' %}{% continue %}{% endif %}
        {% set ns.seen = ns.seen + [m.role] %}
        {% set ns.total = ns.total + m.content|length %}
{{ show(m) }} {{ loop.index }}/{{ loop.length }} {{ loop.cycle('odd', 'even') }} {{ loop.last }}
        {% if loop.index0 > 3 %}{% break %}{% endif %}
    {% else %}
nothing
    {% endfor %}
{% generation %}{{ ns.seen | join(', ') }} {{ ns.total }}{% endgeneration %}

{{ messages | map(attribute='role') | unique | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ {'b': 1, 'a': [1.5, none, true, '<é>']} | tojson }} {{ {'b': 1, 'a': {}} | tojson(indent=4) }}
{{ [3, 1, 2] | sort | join('-') }} {{ 'x' in 'xyz' }} {{ 'a' ~ 1 ~ none }}
{{ '%s is %d' % ('n', 3) }} {{ '{}!'.format('a') }}
{{ (1, 2) + (3,) }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ undefined_thing }} {{ undefined_thing is defined }}
{{ messages[0].get('x', 'none') }}
{{ "a,b".split(",")[1] }} {{ "Ab".startswith("A") }} {{ messages[0].items() | list | length }}
{{ 'x' * 3 }} {{ ('a' if 1 < 2 < 3 else 'b') }}
{{ dict(a=1, b=2) | dictsort }} {{ '  two\\n lines' | indent(2) }} {{ 'abc'[1:] }}
{{ range(3) | list }} {{ 2.567 | round(1) }}
{{ (' <b> ' | safe).strip() }} {{ '<' | e }} {{ ('a' | safe) ~ '<' }} {{ ('a%s' | safe) % '<' }}
{% set block %}inner {{ bos_token }}{% endset %}{{ block | upper }} {% filter upper %}shout{% endfilter %}
{% macro box(edge) %}{{ edge }}{{ caller('in') }}{{ edge }}{% endmacro %}
{%- call(word) box('|') %}{{ word }}side{% endcall %}
{% for row in [[1, 2], [3]] recursive %}{{ loop(row) if row is iterable else row }}{% endfor %}
"""


def theirs(source: str, messages: list[dict[str, Any]], **more: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, **more)
    return str(rendered[0])


def check(source: str, messages: list[dict[str, Any]], *, tools: Any = None, prompt: bool = True, **more: Any) -> str:
    """Our rendering, after comparing it with that of `transformers`."""
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(source, **marks).render(messages, add_generation_prompt=prompt, tools=tools, **more)
    assert ours == theirs(source, messages, tools=tools, add_generation_prompt=prompt, **marks, **more)
    return ours


def template_of(folder: Path) -> str:
    source = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert isinstance(source, str)
    return source


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [USER, CHAT, SYSTEM], ids=["user", "chat", "system"])
def test_smollm2(smollm2_metadata: dict[str, Any], messages: list[dict[str, Any]], prompt: bool) -> None:
    check(smollm2_metadata["tokenizer.chat_template"], messages, prompt=prompt)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [USER, CHAT, SYSTEM], ids=["user", "chat", "system"])
@pytest.mark.parametrize("folder", ["llama3_folder", "qwen2_folder"])
def test_real_templates(
    request: pytest.FixtureRequest, folder: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    check(template_of(request.getfixturevalue(folder)), messages, prompt=prompt)


@pytest.mark.parametrize("model", ["qwen2_5", "qwen3"])
def test_real_templates_with_tools(model: str) -> None:
    source = template_of(realdata.npm_tokenizer(model))
    for messages in (USER, SYSTEM, CALLS):
        text = check(source, messages, tools=TOOLS)
        assert "The weather <now> & later." in text
        check(source, messages, date_string="26 Jul 2024")


def test_thinking_switch_reaches_the_template() -> None:
    source = template_of(realdata.npm_tokenizer("qwen3"))
    assert check(source, CHAT, enable_thinking=False) != check(source, CHAT, enable_thinking=True)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [USER, CHAT, SYSTEM], ids=["user", "chat", "system"])
@pytest.mark.parametrize("source", [PHI3, MISTRAL, DIALECT], ids=["phi3", "mistral", "dialect"])
def test_the_dialect(source: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    check(source, messages, prompt=prompt)
    check(source, messages, prompt=prompt, tools=TOOLS)


def test_variables_without_a_value_are_undefined() -> None:
    source = "{{ bos_token is defined }} {{ eos_token is defined }} {{ unk_token }} {{ tools is none }}"
    assert ChatTemplate(source, eos_token="</s>", unk_token="<unk>").render(USER) == "False True <unk> True"


def test_todays_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == time.strftime("%Y")


def test_templates_refuse_messages_with_their_own_words() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate(MISTRAL, bos_token="<s>", eos_token="</s>").render([*USER, *USER])


def test_a_missing_template_says_how_to_give_one() -> None:
    for source in (None, ""):
        with pytest.raises(TemplateError, match="no chat template") as caught:
            ChatTemplate(source)
        assert "chat_template=" in str(caught.value.hint)


def test_broken_templates_are_named_with_their_line() -> None:
    with pytest.raises(TemplateError, match="not valid Jinja at line 2"):
        ChatTemplate("ok\n{% for %}")
    with pytest.raises(TemplateError, match="failed: 'nothing' is undefined"):
        ChatTemplate("{{ nothing.at.all }}").render(USER)
    with pytest.raises(TemplateError, match="more than 100000"):
        ChatTemplate("x" * 100_001)


def test_messages_are_json() -> None:
    with pytest.raises(RequestError, match=r"chat\.messages\[0\]\.content is a set"):
        ChatTemplate(PHI3).render([{"role": "user", "content": {1}}])


def test_enumerations_are_their_values() -> None:
    class Role(str, enum.Enum):
        USER = "user"

    assert ChatTemplate("{{ messages[0].role }}").render([{"role": Role.USER, "content": ""}]) == "user"


def test_a_template_is_used_many_times() -> None:
    template = ChatTemplate("{{ messages | map(attribute='content') | join }}")
    for _ in range(300):
        assert len(template.render([{"role": "user", "content": "x" * 100_000}])) == 100_000


def test_a_long_chat_fits_the_budget(smollm2_metadata: dict[str, Any]) -> None:
    chat = [{"role": role, "content": f"{n} " * 500} for n in range(1000) for role in ("user", "assistant")]
    for source in (
        smollm2_metadata["tokenizer.chat_template"],
        PHI3,
        MISTRAL,
        template_of(realdata.npm_tokenizer("qwen3")),
    ):
        assert len(ChatTemplate(source, bos_token="<s>", eos_token="</s>").render([*chat, *USER])) > 3_000_000


GROW = (
    "{% set ns = namespace(x='aaaaaaaaaaaaaaaa', y=['a']) %}{% for i in range(99) %}{% set ns.x = GROWN %}{% endfor %}"
)
ATTACKS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "printing loops": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "long text in loops": "{% for i in range(99999) %}" + "z" * 90_000 + "{% endfor %}",
    "lazy loops": "{% for i in range(99999) %}{{ range(99999) | selectattr('x') | list }}{% endfor %}",
    "recursive loop": "{% for x in [[1] * 9] recursive %}{{ loop([[1] * 9]) }}{{ loop([[1] * 9]) }}{% endfor %}",
    "string product": "{{ 'a' * 10**9 }}",
    "list product": "{{ [0] * 10**9 }}",
    "power": "{{ 9 ** 9999999 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "concatenation": GROW.replace("GROWN", "ns.x ~ ns.x"),
    "sum": GROW.replace("GROWN", "ns.x + ns.x"),
    "replace filter": GROW.replace("GROWN", "ns.x | replace('a', 'aaaaaaaaaa')"),
    "replace method": GROW.replace("GROWN", "ns.x.replace('a', 'aaaaaaaaaa')"),
    "join method": GROW.replace("GROWN", "ns.x.join(ns.x)"),
    "join filter": GROW.replace("GROWN", "([ns.x] * 99) | join(ns.x)"),
    "nested lists": GROW.replace("ns.x", "ns.y").replace("GROWN", "[ns.y, ns.y]") + "{{ ns.y }}",
    "nested dicts": GROW.replace("ns.x", "ns.y").replace("GROWN", "{'a': ns.y, 'b': ns.y}") + "{{ ns.y }}",
    "nested tuples": GROW.replace("ns.x", "ns.y").replace("GROWN", "(ns.y, ns.y)") + "{{ ns.y == ns.y }}",
    "shared text": "{% set s = 'a' * 1000000 %}{{ [s] * 99999 }}",
    "shared text as json": "{% set s = 'a' * 900000 %}{{ [s, s, s, s, s, s, s, s, s, s, s] | tojson }}",
    "set block": GROW.replace(
        "{% set ns.x = GROWN %}", "{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}"
    ),
    "cyclic namespace": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent repeated": "{{ ('%(a)s' * 10000) % {'a': 'b' * 10000} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format repeated": "{{ ('{0}' * 10000).format('b' * 10000) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "indent lines": "{{ ('\n' * 1000000) | indent(99999) }}",
    "json indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "round": "{{ 1.5 | round(10**8, 'ceil') }}",
    "center filter": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless block": "{% block b %}{{ self.b() }}{% endblock %}",
    "long attribute": "{{ range(99999) | map(attribute='real.' * 9999 ~ 'real') | list }}",
    "compare": "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{{ s ~ 'b' == s ~ 'c' }}{% endfor %}",
    "contains": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% if 'ab' in s %}{% endif %}{% endfor %}",
    "slices": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "split": "{% set s = 'a ' * 400000 %}{% for i in range(99999) %}{% set t = s.split() %}{% endfor %}",
    "refund": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{{ messages | map('<step>', -10**15) | list }}{% endfor %}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "long sum": "{{ 1" + "+1" * 9999 + " }}",
    "deep blocks": "{% if 1 %}" * 999 + "{% endif %}" * 999,
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "mutation": "{{ messages.append(1) }}",
    "codec": "{{ 'a'.encode() }}",
    "file": "{% include '/etc/passwd' %}",
    "percent key": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "percent precision": "{{ '%.*f' % (1000000000, 1.5) }}",
    "indent other lines": "{{ ('\r' * 100000) | indent(99999, true, true) }}",
    "lazy copies": "{% set s = 'a' * 999999 %}{{ range(99999) | map('default', s, true) | map('upper') | list }}",
    "lazy search": "{% set x = [0] * 60000 %}{{ x | map('string') | select('in', x) | list }}",
    "chained comparison": "{% set x = [1000] * 40000 %}{% set y = [500 + 500] * 40000 %}"
    + "{{ "
    + "x == y == " * 4000
    + "x }}",
    "constant search": "{% for i in range(99999) %}{% if 'ab' in '" + "a" * 90_000 + "' %}{% endif %}{% endfor %}",
    "kept slices": "{% set s = 'a' * 999999 %}{{ [" + "s[1:], " * 999 + "] }}",
    "characters": "{{ ('ж' * 1000000) | list }}",
    "words": "{{ (' ж' * 1000000).split() }}",
    "large hash": "{{ 'f' * 99999 }}{{ ('f' * 99999) | int(base=16) }}",
    "namespaces in namespaces": "{% set ns = namespace(x=0) %}"
    + "{% set ns = namespace(x=ns, y=ns) %}" * 99
    + "{{ ns | string }}",
    "namespace as text": "{{ namespace(x=1) ~ '' }}",
    "printed in a block": "{% set x = ['a' * 999999] %}{% set b %}{% for i in range(99999) %}{{ x }}{% endfor %}"
    "{% endset %}",
    "deep indent": "{% set ns = namespace(x=[0] * 99999) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson(indent=16) }}",
    "long error": "{{ raise_exception('a' * 4000000) }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_stopped(name: str) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(ATTACKS[name]).render(USER)
    assert time.thread_time() - start < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000  # KiB
    assert len(caught.value.message) < 1000


def test_importing_it_does_not_import_jinja() -> None:
    import subprocess
    import sys

    code = "import sys, ruvllm_core.model.chat_template, ruvllm_core.model.tokenizer\n"
    code += "print('jinja2' in sys.modules, 'tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
