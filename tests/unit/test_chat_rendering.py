"""Templates of strangers: rendered as transformers renders them, and bounded in time, memory and size."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_support import BARE, QWEN3, R1_INFERENCE, V3_1, save_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from distill.chat import TEMPLATES, Chat, read_template
from distill.chat.rendering import RENDERER, Renderer, TemplateError
from distill.errors import UserError
from distill.models import Model

# The constructs of Llama 3's, Qwen's, Mistral's and Gemma's published templates, in templates of our own.
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN3_LIKE = """{%- set ns = namespace(last=messages|length - 1, tools=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not ns.tools %}
        {%- set ns.last = messages|length - loop.index %}
        {%- set ns.tools = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- set thought = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + (thought or '') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif loop.first %}
        {%- continue %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
"""
CONSTRUCTS = """  {% macro turn(m) %}
   {% if m.role is defined %}[{{ m.role|upper }}]{% endif %}
{{ m['content']|replace('a', 'b')|tojson }}
{% endmacro %}
{% for m in messages %}
    {%- if loop.index0 == 7 %}{% break %}{% endif -%}
    {{ turn(m) }}{% generation %} {{ m.content }} {% endgeneration %}
    {{- loop.cycle('x', 'y') }} {{ "%s|%d" % (m.role, 3) }} {{ {'a': [1, 2.5, none, true]}|tojson(indent=2) }}
{% endfor %}
{% set d = dict(a=1, **{'b': 2}) %}{{ d.items()|list }} {{ tools is none }} {{ documents }} {{ undefined_name }}
{% raw %}{{ untouched }}{% endraw %} {{ "<b>" }} {{ eos_token ~ bos_token }} {# comment #}
"""
PUBLISHED = {
    "r1": R1_INFERENCE,
    "bare": BARE,
    "v3.1": V3_1,
    "qwen3": QWEN3,
    "qwen3 whole": QWEN3_LIKE,
    "llama3": LLAMA3,
    "constructs": CONSTRUCTS,
    **{f"built-in {name}": read_template(name) for name in TEMPLATES},
    "tiny-r1": (Path(__file__).parents[2] / "teachers/tiny-r1/chat_template.jinja").read_text(),
    "tiny-qwen": (Path(__file__).parents[2] / "students/tiny-qwen/chat_template.jinja").read_text(),
}
CONVERSATIONS = [
    [{"role": "user", "content": "1 + 1?"}],
    [{"role": "system", "content": " Think. "}, {"role": "user", "content": "a <|im_end|> é ‮ \ud800"}],
    [
        {"role": "user", "content": "\n1 + 1? \n"},
        {"role": "assistant", "content": "<think>\ntwo\n</think>\n\n2"},
        {"role": "user", "content": "and {{ 7 * 7 }}?"},
        {"role": "assistant", "content": "<think></think>9 & <b>"},
    ],
]
VARIABLES = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_renders_as_transformers_renders_it(name: str, prompt: bool) -> None:
    modes = VARIABLES | {"thinking": True, "enable_thinking": True}
    expected, _ = render_jinja_template(
        CONVERSATIONS, chat_template=PUBLISHED[name], add_generation_prompt=prompt, **modes
    )
    assert RENDERER.render(PUBLISHED[name], modes, [(chat, prompt) for chat in CONVERSATIONS]) == expected


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """A renderer with tight limits, so that exceeding them is quick."""
    bounded = Renderer(seconds=0.5, memory=256 << 20, characters=1 << 20)
    yield bounded
    bounded.close()


RUNAWAY = {
    "string product": "{{ 'a' * 10**10 }}",
    "power": "{{ 10**(10**10) }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "lists in lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "just": "{{ 'a'.ljust(10**10) }}",
    "replace": "{% set a = 'a' * 10**6 %}{{ a|replace('a', a) }}",
    "indent": "{{ {'a': 1}|tojson(indent=10**10) }}",
    "words": "{{ lipsum(n=10**6) }}",
    "long": "{{ 'a' * 2**21 }}",
    "while compiling": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", RUNAWAY)
def test_a_runaway_template_is_ended_in_one_line(name: str, renderer: Renderer) -> None:
    with pytest.raises(TemplateError) as caught:
        renderer.render(RUNAWAY[name], {}, [(CONVERSATIONS[0], True)])
    assert str(caught.value) and "\n" not in str(caught.value)
    assert renderer.render("{{ messages[0].content }}", {}, [(CONVERSATIONS[0], True)]) == ["1 + 1?"], "it goes on"


def test_the_bounds_name_themselves(renderer: Renderer) -> None:
    def said(template: str) -> str:
        with pytest.raises(TemplateError) as caught:
            renderer.render(template, {}, [(CONVERSATIONS[0], True)])
        return str(caught.value)

    assert "more than 0.5 s of processor time" in said(RUNAWAY["nested loops"])
    assert said(RUNAWAY["string product"]) == "it needs too much memory"
    assert said(RUNAWAY["long"]) == "it renders 2,097,152 characters; at most 1,048,576 are read"
    assert "at most 1,048,576 are read" in said(" " * (1 << 20) + "x")


def test_time_is_counted_for_each_conversation_alone(renderer: Renderer) -> None:
    """A batch may take longer than one conversation may."""
    slow = "{% for i in range(30000) %}{% if i == 1 %}x{% endif %}{% endfor %}"
    assert renderer.render(slow, {}, [(CONVERSATIONS[0], True)] * 500) == ["x"] * 500


MISTAKES = {
    "syntax": ("a\n{% if %}", r"line 2: "),
    "unclosed": ("{% for m in messages %}", r"line 1: Unexpected end of template"),
    "undefined": ("{{ nobody.name }}", r"'nobody' is undefined"),
    "type": ("{{ messages + 1 }}", r"TypeError: can only concatenate list"),
    "filter": ("{{ 'a'|nothing }}", r"No filter named 'nothing'"),
    "raised": ("{{ raise_exception('System role\n not supported') }}", r"System role not supported"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", r"access to attribute"),
    "division": ("{{ 1 / 0 }}", r"ZeroDivisionError"),
    "include": ("{% include 'a' %}", r"no loader"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_failing_template_is_refused_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    template, said = MISTAKES[name]
    with pytest.raises(UserError, match=f"does not render a conversation of user: .*{said}") as caught:
        Chat.load(save_tokenizer(tmp_path, template))
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    assert "for a student set `train.chat_template` to chatml (its tokens are here)" in message


def test_a_template_that_takes_no_system_message_says_so_for_the_row_that_has_one(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<|user|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = Chat.load(save_tokenizer(tmp_path, template))
    rows = [[*CONVERSATIONS[0]], [{"role": "system", "content": "s"}, *CONVERSATIONS[0]]]
    assert chat.prompt_ids(rows[0])
    with pytest.raises(UserError, match="a conversation of system, user: System role not supported"):
        chat.training_rows([[*row, {"role": "assistant", "content": "2"}] for row in rows])


def test_named_templates_need_a_default(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, None)
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("{{ messages }}")
    (folder / "tool_use.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"several chat templates \((rag, tool_use|tool_use, rag)\) and none named"):
        Chat.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(BARE)
    assert Chat.load(tmp_path).prompt_text(CONVERSATIONS[0]) == "<|bos|><|user|>1 + 1?<|assistant|>"


def test_a_child_that_was_killed_is_replaced() -> None:
    renderer = Renderer()
    assert renderer.render("{{ 1 }}", {}, [(CONVERSATIONS[0], True)]) == ["1"]
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait()
    assert renderer.render("{{ 2 }}", {}, [(CONVERSATIONS[0], True)]) == ["2"]
    renderer.close()
    renderer.close()


DATED = LLAMA3.replace("+ system_message", '+ "Today: " + strftime_now("%d %b %Y") + system_message')


def test_the_date_of_a_template_is_fixed_and_part_of_what_identifies_a_model(tmp_path: Path) -> None:
    """The day that Llama 3.1 to 3.3 name without a clock. Any other day is another prompt, so a run records it."""
    directory = save_tokenizer(tmp_path / "dated", DATED)
    text = Chat.load(directory).prompt_text([{"role": "user", "content": "hi"}])
    assert "Today: 26 Jul 2024" in text
    assert Model("dated", directory).identity["date"] == "2024-07-26"
    other = tmp_path / "other.jinja"
    other.write_text(BARE)
    assert "date" not in Model("bare", directory, template=str(other)).identity
    assert "date" not in Model("plain", save_tokenizer(tmp_path / "plain", BARE)).identity
