"""Templates: found by name, rendered as transformers does, and stopped when they run wild."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from utils.chat_templates import ChatTemplate, TemplateRenderer, list_shipped, resolve_template
from utils.exceptions import DataError, ModelLoadingError, RecipeError, TunebookError
from utils.template_limits import MAX_SECONDS

ROOT = Path(__file__).resolve().parents[2]
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for a in range(99999) %}"
DOUBLE = "{% set ns = namespace(x='ab') %}" + LOOP


def render(source: str, messages: list[dict[str, Any]] | None = None, **given: Any) -> str:
    return TemplateRenderer(ChatTemplate("test", source), SPECIAL).render(messages or HELLO, **given)


def resolve(name: str, **given: Any) -> ChatTemplate:
    return resolve_template(name, **{"strategy": "auto", "model_template": "own {{ messages }}", **given})


def test_auto_takes_the_models_own_template() -> None:
    assert resolve("auto") == ChatTemplate("model", "own {{ messages }}")
    assert resolve("auto", strategy="chat").name == "model"


@pytest.mark.parametrize("given", [{"strategy": "standard"}, {"model_template": None}, {"model_template": ""}])
def test_without_chat_one_template_serves_the_whole_run(given: dict[str, Any]) -> None:
    assert resolve("auto", row_formats=["prompt_completion"], **given).name == "raw"
    assert resolve("auto", row_formats=["prompt_completion", "text"], **given).name == "raw"
    assert resolve("auto", row_formats=["prompt_completion", "alpaca"], **given).name == "alpaca"
    assert resolve("auto", row_formats=["messages"], **given).name == "alpaca"


@pytest.mark.parametrize("missing", [None, "", {}])
def test_chat_without_a_template_is_refused_with_the_way_out(missing: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("auto", strategy="chat", model_template=missing)
    assert caught.value.problems[0].code == "no-chat-template"
    assert "data.strategy: standard" in (caught.value.problems[0].fix or "")


def test_of_several_templates_of_a_model_the_rows_choose() -> None:
    several = {"default": "plain", "tool_use": "with tools", "rag": "other"}
    assert resolve("auto", model_template=several).source == "plain"
    assert resolve("auto", model_template=several, row_formats=["messages", "tools"]).source == "with tools"
    assert resolve("auto", model_template={"only": "one"}).source == "one"


def test_a_template_may_be_a_shipped_name_a_file_or_text(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{{ messages[0].content }}", encoding="utf-8")
    assert resolve(str(path)) == ChatTemplate(str(path), "{{ messages[0].content }}")
    assert resolve("{{ messages[0].content }}!").name == "recipe"
    assert {resolve(name).name for name in list_shipped()} == set(list_shipped())


def test_the_issues_templates_are_shipped() -> None:
    asked = {"alpaca", "chatml", "llama2", "llama3", "phi", "qwen", "gemma", "mistral", "zephyr", "vicuna", "raw"}
    assert asked == set(list_shipped())


@pytest.mark.parametrize(("name", "near"), [("chatmll", "chatml"), ("llama-3", "llama3"), ("Auto", "auto")])
def test_a_mistyped_name_is_refused_with_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(name, where="r.yaml:7")
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("no-template", "r.yaml:7")
    assert f"did you mean {near}?" in (problem.fix or "")
    assert ", ".join(list_shipped()) in (problem.fix or "")


@pytest.mark.parametrize("name", ["none.jinja", "../alpaca", "", "alpaca/../raw"])
def test_what_is_no_template_is_refused(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(name)
    assert caught.value.problems[0].code == "no-template"


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{{ a }}")
    for name in ("folder.jinja", "binary.jinja"):
        with pytest.raises(RecipeError, match="cannot be read"):
            resolve(str(tmp_path / name))


def test_a_syntax_error_is_shown_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{# one #}\n{{ a }}\n{% for %}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        resolve(str(path))
    assert caught.value.problems[0].where == f"{path}:3"
    with pytest.raises(RecipeError, match="line 1"):
        resolve("{% for %}")
    with pytest.raises(ModelLoadingError, match="model's own"):
        resolve("auto", model_template="{% for %}")


def test_the_hash_is_that_of_the_source() -> None:
    assert ChatTemplate("a", "x").hash == ChatTemplate("b", "x").hash
    assert ChatTemplate("a", "x").hash != ChatTemplate("a", "y").hash


FEATURES = {
    "white space control": "{% if true %}\n  a\n{% endif %}\n  b {%- if true %} c{% endif -%}\n d",
    "loop controls": "{% for a in range(9) %}{% if a == 2 %}{% continue %}{% elif a == 5 %}{% break %}{% endif %}{{ a }}"
    "{% endfor %}",
    "loop variables": "{% for a in 'xyz' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.nextitem }}"
    "{{ loop.revindex }}{{ loop.previtem }}{{ loop.cycle('p', 'q') }}{% endfor %}",
    "empty loop": "{% for a in none_such %}{% else %}none{% endfor %}{% for a in [] %}{% else %}none{% endfor %}",
    "filtered loop": "{% for a in range(9) if a is odd %}{{ a }}{{ loop.length }}{% endfor %}",
    "recursive loop": "{% for a in [[1, [2, 3]], [4]] recursive %}{{ a if a is number else loop(a) }},{% endfor %}",
    "namespace": "{% set ns = namespace(a=1) %}{% for b in range(3) %}{% set ns.a = ns.a + b %}{% endfor %}{{ ns.a }}",
    "macro": "{% macro f(a, b=2) %}{{ a ~ b ~ varargs }}{{ caller() if caller }}{% endmacro %}{{ f(1, 2, 3) }}"
    "{% call f(1) %}!{% endcall %}",
    "set block": "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}",
    "tojson": "{{ {'a': '<é\"', 'b': [1, none, true]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}",
    "methods": "{{ 'a,b'.split(',') }}{{ {'a': 1}.items() | list }}{{ 'abc'.replace('b', 'xx') }}{{ '-'.join(['a', 'b']) }}",
    "slices": "{{ messages[::-1] }}{{ messages[-1].content[0] }}{{ 'abc'[1:] }}",
    "filters": "{{ [3, 1] | sort | join('-') }}{{ 'a' | default('b') }}{{ x | default('b') }}{{ {'a': 1} | items | list }}"
    "{{ [1, 2] | first }}{{ ' a ' | trim }}{{ 'a\nb' | indent }}",
    "lazy filters": "{{ messages | map(attribute='role') | list }}{{ [1, 2] | select('odd') | list }}",
    "operators": "{{ 2 + 3 * 4 ** 2 % 5 }}{{ 'a' ~ 1 ~ none }}{{ '%s-%d' % ('a', 1) }}{{ 'a' * 3 }}{{ [1] + [2] }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}{{ 1 in [1] }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set y = 1 %}{% endgeneration %}{{ y }}{% endfor %}",
    "undefined": "{{ a }}{{ messages[0].b }}{{ a is defined }}{{ tools is none }}{{ documents is none }}{{ bos_token }}",
    "tests": "{{ 'a' is string }}{{ messages is mapping }}{{ messages is iterable }}{{ messages is sequence }}",
    "format": "{{ '{:>5}'.format('a') }}{{ '%5s' | format('a') }}",
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_of_templates_renders_as_in_transformers(name: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hello", "reasoning": "hm", "name": None}]
    source = FEATURES[name] + "{{ messages }}"
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    expected = render_jinja_template([plain], chat_template=source, **SPECIAL)[0][0]
    assert render(source, messages) == expected


def test_today_is_always_the_same_day() -> None:
    # With the real date no run could be repeated, and a cache would be wrong at midnight.
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


def test_a_template_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "Hi", "list": [1]}]
    for source in (
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ messages[0].list.append(2) }}",
        "{{ messages.clear() }}",
    ):
        with pytest.raises(DataError):
            render(source, messages)
    assert messages == [{"role": "user", "content": "Hi", "list": [1]}]


HOSTILE = {
    "loops without end": LOOP * 5 + "{% endfor %}" * 5,
    "macros without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros that double": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a giant product": "{{ 'a' * 10 ** 10 }}",
    "a giant list": "{{ [0] * 10 ** 9 }}",
    "a giant number": "{{ 10 ** 1000000000 }}",
    "numbers that square": "{% set ns = namespace(x=3) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a width as argument": "{{ '%*d' % (1000000000, 1) }}",
    "a wide field by filter": "{{ '%1000000000d' | format(1) }}",
    "a wide field by method": "{{ '{:1000000000}'.format(1) }}",
    "a nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a wide field by map": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 999999999}) }}",
    "a wide centre": "{{ 'a' | center(10 ** 9) }}",
    "a wide margin": "{{ 'a'.ljust(10 ** 9) }}",
    "wide tabs": "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "wide indents": "{{ ('a\n' * 100000) | indent(100000) }}",
    "text that doubles by +": DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "text that doubles by ~": DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "text that doubles in a block": DOUBLE + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "text that grows by replacing": DOUBLE + "{% set ns.x = ns.x.replace('b', 'bbb' * 9) %}{% endfor %}",
    "text that grows by a filter": DOUBLE + "{% set ns.x = ns.x | replace('b', 'bbb' * 9) %}{% endfor %}",
    "text that grows by joining": DOUBLE + "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}",
    "text that grows by translating": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "lists that double": DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "tuples that double": DOUBLE + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x == ns.x }}",
    "dicts that double": DOUBLE + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | tojson }}",
    "a joined range": "{% set x = 'a' * 1000000 %}{{ range(99999) | join(x) }}",
    "a lazy map": "{{ range(99999) | map('string') | map('center', 100000) | join }}",
    "a giant batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "endless slices": "{{ [1] | slice(10 ** 9) | list }}",
    "a wide JSON": "{{ {'a': 1} | tojson(indent=10 ** 9) }}",
    "a giant range": "{{ range(10 ** 9) | list }}",
    "a giant output": LOOP + "{{ 'x' * 1000 }}{% endfor %}",
    "a giant macro": "{% macro f() %}" + LOOP + "x" * 1000 + "{% endfor %}{% endmacro %}{{ f() }}",
    "a wide date": "{{ strftime_now('%1000000000Y') }}",
    "many parts": "{{" + "~".join(["('a' * 1000000)"] * 300) + "}}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a long chain": "{{ " + "+".join(["1"] * 5000) + " }}",
    "many expressions": "{{ a }}" * 21000,
    "a long source": "x" * 300_000,
    "Python's internals": "{{ ''.__class__.__mro__ }}",
    "internals by a namespace": "{% set ns = namespace(__class__=1) %}",
    "internals set later": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "internals of a function": "{{ cycler.__init__.__globals__ }}",
    "a constant folded while compiling": "{% if 'a'|center(999999)|replace(' ','bbbb')|wordwrap(1) %}{% endif %}" * 4,
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "a parent": "{% extends 'x' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_soon_with_a_clear_error(name: str) -> None:
    start = time.process_time()  # others may keep the processor busy
    with pytest.raises(DataError) as caught:
        render(HOSTILE[name])
    assert time.process_time() - start < MAX_SECONDS + 3
    problem = caught.value.problems[0]
    assert problem.code in ("template-limit", "template")
    assert problem.fix
    assert len(problem.message) < 300


def test_hidden_attributes_are_empty() -> None:
    # The sandbox gives an undefined value for them, which prints as nothing.
    for source in ("{{ messages[0].__class__ }}", "{{ ''|attr('__class__') }}", "{{ raise_exception.__globals__ }}"):
        assert render(source) == ""


def test_a_hostile_template_is_refused_when_it_is_chosen() -> None:
    for name in ("deep brackets", "many expressions", "a long source", "another file"):
        with pytest.raises(TunebookError):
            resolve("{{ 1 }}" + HOSTILE[name])


def test_a_long_conversation_is_no_attack() -> None:
    # Output may be long where the input is: 4 MB of text is rendered and returned.
    messages = [{"role": "user", "content": "x" * 2_000_000}, {"role": "assistant", "content": "y" * 2_000_000}]
    assert len(render(resolve("chatml").source, messages)) > 4_000_000
    many = [{"role": ("user", "assistant")[n % 2], "content": "Hello there"} for n in range(4000)]
    assert render(resolve("qwen").source, many).count("Hello there") == 4000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")
def test_the_memory_limit_is_lifted_after_a_rendering() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError):
        render(HOSTILE["tuples that double"])
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_rendering_imports_no_framework() -> None:
    code = """
import sys
from utils.chat_templates import TemplateRenderer, resolve_template
template = resolve_template("qwen", strategy="auto", model_template=None)
TemplateRenderer(template, {}).render([{"role": "user", "content": "Hi"}])
print(sorted(set(sys.modules) & {"torch", "transformers", "tokenizers", "numpy"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


SYSTEM = [{"role": "system", "content": "Be brief."}]
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Written by hand from the sources that the templates' headers name.
KNOWN = {
    "llama2": (
        "<s>[INST] Hi [/INST] Hello. </s><s>[INST] Bye [/INST] Goodbye. </s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    ),
    "mistral": (
        "<s>[INST] Hi [/INST] Hello.</s>[INST] Bye [/INST] Goodbye.</s>",
        "<s>[INST] Be brief.\n\nHi [/INST]",
    ),
    "zephyr": (
        "<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n<|assistant|>\nGoodbye.</s>\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
    ),
    "vicuna": (
        f"{VICUNA} USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT: Goodbye.</s>",
        "Be brief. USER: Hi ASSISTANT:",
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nGoodbye.<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "raw": ("HiHello.</s>ByeGoodbye.</s>", "Be brief.\n\nHi"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_shipped_template_writes_its_format(name: str) -> None:
    source = resolve(name).source
    assert render(source, CHAT) == KNOWN[name][0]
    assert render(source, [*SYSTEM, CHAT[0]], prompt=True) == KNOWN[name][1]


@pytest.mark.parametrize("name", ["alpaca", "llama2", "phi", "gemma", "mistral", "zephyr", "vicuna"])
def test_a_shipped_template_without_tools_refuses_what_a_tool_says(name: str) -> None:
    # Leaving the message out would train on an answer to a result that nobody sees.
    with pytest.raises(DataError, match="this format has"):
        render(resolve(name).source, [CHAT[0], {"role": "tool", "content": "12"}, CHAT[1]])
