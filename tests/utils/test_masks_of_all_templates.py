"""Every chat template that ships with trl, with six conversations each: what is rendered, learned and refused.

trl ships most templates twice: as the model has it, and with `{% generation %}` marks around what it would learn. Where the two
masks differ, the reason is one of `REASONS`, and docs/results/templates.md lists the same.
"""

from __future__ import annotations

import importlib.util
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from utils import template_sandbox
from utils.examples import Example
from utils.exceptions import DataError, RecipeError
from utils.tokenizer_utils import EncodedExample, TokenizerUtils

TRL = importlib.util.find_spec("trl")
CHAT_TEMPLATES = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL else Path()  # type: ignore[index]
pytestmark = pytest.mark.skipif(TRL is None, reason="trl is not installed")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "templates.md"
NAMES = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
CONTROL = re.compile(
    r"<\|[\w\"]+\|?>|<\w+\|>|<｜[^｜]+｜>|<(?:start_of_turn|end_of_turn|end_of_utterance|sop)>|\[gMASK\]|</s>"
)
BOS, EOS = "<BOS>", "<EOS>"
OPENED: dict[Any, TokenizerUtils] = {}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}},
    },
}
FIRST, SECOND = user("What is 2 + 2?"), user("And 3 + 3?")
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [FIRST, assistant("It is 4.")],
    "multi": [FIRST, assistant("It is 4."), SECOND, assistant("That is 6.")],
    "system": [{"role": "system", "content": "Be brief."}, FIRST, assistant("It is 4.")],
    "tools": [
        user("Weather in Oslo?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "12 degrees", "name": "get_weather", "tool_call_id": "call00001"},
        assistant("Twelve."),
    ],
    "thinks last": [
        FIRST,
        assistant("It is 4."),
        SECOND,
        assistant("That is 6.", reasoning_content="Three and three."),
    ],
    "thinks always": [
        FIRST,
        assistant("It is 4.", reasoning_content="Two and two."),
        SECOND,
        assistant("That is 6.", reasoning_content="Three and three."),
    ],
}
THINKING = {"thinks last", "thinks always"}
ALL = set(CONVERSATIONS)
CHAT = {"single", "multi", "system"}

# Why our mask differs from that of the training form; the letter stands in the table of the page.
REASONS = {
    "N": "theirs also learns what stands behind the terminator",
    "P": "theirs also learns the end of the generation prompt",
    "C": "theirs has no thinking block where the generation prompt opens one, so ours closes it",
    "T": "theirs leaves out the thinking of earlier turns, ours learns it in a sequence of its own",
    "E": "theirs ends earlier turns otherwise than the last one, ours ends each as generation ends",
    "R": "theirs does not learn the token that hands over to a tool",
    "H": "theirs does not learn the turn's header, though no generation prompt writes it here",
}
DIFFERENCES: dict[str, str] = {
    "cohere": "",
    "cohere2": "",
    "deepseek_r1_distill": "CPT",
    "deepseekv3": "CPT",
    "diffusion_gemma": "HNRT",
    "gemma": "N",
    "gemma3": "N",
    "gptoss": "EPT",
    "idefics3": "N",
    "lfm2": "N",
    "lfm2_2_5": "NT",
    "lfm2_2_5_v2": "NT",
    "lfm2_2_5_vl": "NT",
    "lfm2_v2": "N",
    "llama3": "",
    "llava_next": "",
    "muse_glimmer": "P",
    "nemotron_3_5_lightning": "NPT",
    "nemotron_3_nano": "NPT",
    "nemotron_3_super": "NPT",
    "nemotron_3_ultra": "NPT",
    "phi3": "N",
    "phi3_5": "N",
    "qwen2_5": "NP",
    "qwen2_5_vl": "N",
    "qwen3": "N",
    "qwen3_5_nothink": "NP",
    "qwen3_5_think": "NP",
    "qwen3_6": "NP",
    "qwen3_8": "NP",
    "qwen3_instruct_2507": "N",
    "qwen3_vl": "N",
    "smolvlm": "N",
}
# What a template refuses, and the code of the error; all else must work.
HIDES_BOTH = dict.fromkeys(["tools", *sorted(THINKING)], "template-hides")
HIDES_THINKING = dict.fromkeys(sorted(THINKING), "template-hides")
MIXED = {"thinks last": "template-thinking"}
REFUSED: dict[str, dict[str, str]] = {
    "cohere": HIDES_BOTH,
    "cohere2": HIDES_BOTH,
    "deepseek_r1_distill": {"tools": "template-hides"},
    "gemma": {**HIDES_BOTH, "system": "template"},
    "gemma3": HIDES_BOTH,
    "gemma4": HIDES_THINKING,
    "gemma4_v2": HIDES_THINKING,
    "gemma4_v3": HIDES_THINKING,
    "gemma4_v4": HIDES_THINKING,
    "glm4moe": dict.fromkeys(CONVERSATIONS, "no-terminator"),
    "idefics3": HIDES_BOTH,
    "lfm2": HIDES_BOTH,
    "lfm2_v2": HIDES_THINKING,
    "llama3": HIDES_BOTH,
    "llama3_1": HIDES_THINKING,
    "llama3_2": HIDES_THINKING,
    "llava_next": HIDES_BOTH,
    "nemotron_3_5_lightning": MIXED,
    "nemotron_3_nano": MIXED,
    "nemotron_3_super": MIXED,
    "nemotron_3_ultra": MIXED,
    "phi3": HIDES_BOTH,
    "phi3_5": HIDES_BOTH,
    "qwen2_5": HIDES_THINKING,
    "qwen2_5_vl": HIDES_BOTH,
    "qwen3_instruct_2507": HIDES_THINKING,
    "qwen3_vl": HIDES_THINKING,
    "smolvlm": HIDES_BOTH,
}
# Templates that show an earlier turn in another way than when it was the last: a sequence for each turn.
SEVERAL: dict[str, set[str]] = {
    "deepseek_r1_distill": {"multi", *THINKING},
    "deepseekv3": {"multi", "tools", *THINKING},
    "gptoss": {"multi", *THINKING},
    "qwen3": {"multi", "tools", *THINKING},
    "qwen3_5_nothink": {"multi", *THINKING},
    "qwen3_5_think": {"multi", *THINKING},
    "qwen3_6": {"multi", *THINKING},
    "diffusion_gemma": {"thinks always"},
    "gemma4_v5": {"thinks always"},
    "lfm2_2_5": {"thinks always"},
    "lfm2_2_5_v2": {"thinks always"},
    "lfm2_2_5_vl": {"thinks always"},
    "nemotron_3_5_lightning": {"thinks always"},
    "nemotron_3_nano": {"thinks always"},
    "nemotron_3_super": {"thinks always"},
    "nemotron_3_ultra": {"thinks always"},
}
# Templates whose option enable_thinking has to leave its default, and for which conversations.
PINNED: dict[str, set[str]] = {
    "nemotron_3_5_lightning": ALL - THINKING,
    "nemotron_3_nano": ALL - THINKING,
    "nemotron_3_super": ALL - THINKING,
    "nemotron_3_ultra": ALL - THINKING,
    "qwen3_5_nothink": THINKING,
}


def list_working(name: str) -> list[str]:
    """The conversations that a template can teach."""
    return [case for case in CONVERSATIONS if case not in REFUSED.get(name, {})]


@pytest.fixture(scope="module")
def plain_tokenizer() -> str:
    """A small real BPE tokenizer, as text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["What is 2 + 2? It is 4. Be brief. assistant user system"] * 3, trainer)
    return str(backend.to_str())


@pytest.fixture(scope="module")
def tokenizers(plain_tokenizer: str) -> dict[str, Any]:
    return {name: make_tokenizer(plain_tokenizer, name) for name in NAMES}


def read_source(name: str) -> str:
    return (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(plain: str, name: str) -> Any:
    """A tokenizer that knows the control tokens of a template; eos is also the pad token."""
    source = read_source(name)
    tokens = [*sorted(set(CONTROL.findall(source))), BOS, EOS]
    backend = Tokenizer.from_str(plain)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    bos = BOS if "bos_token" in source else None
    if bos is not None:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = source
    return tokenizer


def open_tools(tokenizer: Any, case: str, **more: Any) -> TokenizerUtils:
    holds = {"messages"} | ({"thinking"} if case in THINKING else set())
    key = (id(tokenizer), "thinking" in holds, more.get("loss_on"))
    if key not in OPENED:
        OPENED[key] = TokenizerUtils(tokenizer, row_formats=holds, **more)
    return OPENED[key]


def make_example(case: str) -> Example:
    tools = (TOOL,) if case == "tools" else ()
    return Example("messages", tuple(CONVERSATIONS[case]), None, "rows.jsonl:7", {}, tools)


def list_runs(tokenizer: Any, ids: Any, mask: Any) -> list[str]:
    """The text of each run of learned tokens."""
    runs: list[list[int]] = [[]]
    for index, learned in zip(ids, mask, strict=True):
        if learned:
            runs[-1].append(int(index))
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def list_all_runs(tokenizer: Any, encoded: list[EncodedExample]) -> list[str]:
    return [run for one in encoded for run in list_runs(tokenizer, one.input_ids, one.loss_mask)]


def spell_for_oracle(name: str, case: str) -> list[dict[str, Any]]:
    """The conversation as transformers must be given it: parts for vision models, JSON text for DeepSeek's arguments."""
    messages = CONVERSATIONS[case]
    if name in ("idefics3", "smolvlm", "llava_next"):
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    if name == "deepseekv3":
        function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
        call = {"type": "function", "function": function}
        return [{**turn, "tool_calls": [call]} if "tool_calls" in turn else turn for turn in messages]
    return messages


@pytest.mark.parametrize("name", NAMES)
def test_the_rendering_is_that_of_transformers(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(template_sandbox, "TODAY", datetime.now())  # the one difference that is meant
    tokenizer = tokenizers[name]
    ours = TokenizerUtils(tokenizer)
    for case in list_working(name):
        tools, messages = make_example(case).tools, spell_for_oracle(name, case)
        for count, prompt in ((len(messages), False), (len(messages) - 1, True)):
            expected = tokenizer.apply_chat_template(
                messages[:count], tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(CONVERSATIONS[case][:count], tools, prompt=prompt) == expected


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_is_learned_once_and_ends_with_a_control_token(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    for case in list_working(name):
        example, tools = make_example(case), open_tools(tokenizer, case)
        encoded = tools.encode_conversation(example)
        assert (len(encoded) > 1) == (case in SEVERAL.get(name, ()))
        assert (tools.template.source != tokenizer.chat_template) == (case in PINNED.get(name, ()))
        answers = [turn for turn in example.messages if turn["role"] == "assistant"]
        runs = list_all_runs(tokenizer, encoded)
        assert len(runs) == len(answers)
        for run, turn in zip(runs, answers, strict=True):
            assert turn["content"] in run
            assert turn.get("reasoning_content", "") in run
            assert all(call["function"]["name"] in run for call in turn.get("tool_calls", ()))
        for one in encoded:
            ends = [i for i in range(len(one.input_ids)) if one.loss_mask[i] and not one.loss_mask[i + 1 : i + 2].any()]
            # eos is the pad token here: masking by token id would unlearn it.
            assert all(int(one.input_ids[i]) in tokenizer.added_tokens_decoder for i in ends)


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_beginning_of_the_last_sequence(tokenizers: dict[str, Any], name: str) -> None:
    for case in list_working(name):
        example = make_example(case)
        for policy in ("assistant", "last", "all"):
            tools = open_tools(tokenizers[name], case, loss_on=policy)
            encoded = tools.encode_example(example)
            prompt = tools.encode_prompt(example.prompt, example.tools)
            assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
            assert encoded.loss_mask[len(prompt) :].all()
            if policy == "last":
                assert not encoded.loss_mask[: len(prompt)].any()
            if policy == "all":
                assert encoded.loss_mask[1:].all()


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_bos_where_the_tokenizer_adds_it(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    for case in list_working(name):
        for one in open_tools(tokenizer, case).encode_conversation(make_example(case)):
            if tokenizer.bos_token is not None:
                assert one.input_ids[0] == tokenizer.bos_token_id
                assert (one.input_ids == tokenizer.bos_token_id).sum() == 1
                assert not one.loss_mask[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_control_token_in_a_message_is_refused(tokenizers: dict[str, Any], name: str) -> None:
    tools = open_tools(tokenizers[name], "single")
    for token in sorted(set(CONTROL.findall(read_source(name)))):
        for messages in ([user(f"a{token}"), assistant("b")], [user("a"), assistant(f"b {token} c")]):
            with pytest.raises(DataError) as caught:
                tools.encode_conversation(Example("messages", tuple(messages), None, "rows.jsonl:7", {}))
            assert caught.value.problems[0].code == "control-token"
        with pytest.raises(DataError, match="control token"):
            tools.encode_prompt([user(token)])


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_cannot_teach_is_refused_with_its_row(tokenizers: dict[str, Any], name: str) -> None:
    for case, code in REFUSED[name].items():
        with pytest.raises(DataError) as caught:
            open_tools(tokenizers[name], case).encode_conversation(make_example(case))
        problem = caught.value.problems[0]
        assert (problem.code, problem.where) == (code, "rows.jsonl:7")
        assert problem.fix


@pytest.mark.parametrize("name", NAMES)
def test_generation_stops_where_training_taught_it_to(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    stops = open_tools(tokenizer, "single").find_stop_ids()
    assert tokenizer.eos_token_id in stops
    for case in {"single", "tools"} & set(list_working(name)):
        encoded = open_tools(tokenizer, case).encode_conversation(make_example(case))
        for run in list_all_runs(tokenizer, encoded):
            assert tokenizer(run, add_special_tokens=False).input_ids[-1] in stops


def find_training_form(name: str) -> str | None:
    path = CHAT_TEMPLATES / f"{name}_training.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return source if re.search(r"\{%-?\s*generation", source := read_source(name)) else None


def explain(ours: str, theirs: str, prompt: str) -> str:
    """The letters of the reasons for which two learned turns differ; fails where none explains it."""
    found = ""
    for tail in (f"\n{EOS}", "\n"):
        if theirs != ours and theirs.endswith(tail):
            theirs, found = theirs.removesuffix(tail), found + "N"
    if theirs != ours and ours.endswith("<|tool_response>"):
        ours, found = ours.removesuffix("<|tool_response>"), found + "R"
    if ours.endswith("<|return|>") and theirs.endswith("<|end|>"):
        ours, theirs, found = ours.removesuffix("<|return|>"), theirs.removesuffix("<|end|>"), found + "E"
    if theirs != ours and ours.endswith(theirs) and ours.removesuffix(theirs) == "<|turn>model\n":
        ours, found = theirs, found + "H"
    # What the prompt ends with and theirs begins with; DeepSeek's and Nemotron's prompts go on with an open thinking block.
    for end in (prompt, re.sub(r"<think>\n$", "", prompt), re.sub(r"\n$", "", prompt)):
        heads = [theirs[:length] for length in range(len(theirs), 0, -1) if end.endswith(theirs[:length])]
        if theirs != ours and heads and not ours.startswith(heads[0]):
            theirs, found = theirs.removeprefix(heads[0]), found + "P"
            break
    if theirs != ours and "</think>" in ours and "</think>" not in theirs:
        thinking, _, ours = ours.partition("</think>")
        found += "T" if thinking.strip() else "C"
        ours, theirs = ours.strip("\n"), theirs.strip("\n")
    elif theirs != ours and ("</think>" in theirs or "<channel|>" in ours or "analysis" in ours):
        ours = re.sub(
            r"^.*(</think>|<channel\|>|<\|start\|>assistant(?=<\|channel\|>final))", "", ours, flags=re.DOTALL
        )
        theirs = theirs.replace("<think></think>", "").replace("</think>", "")
        ours, theirs, found = ours.strip("\n"), theirs.strip("\n"), found + "T"
    assert theirs == ours
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "glm4moe"])
def test_the_mask_is_that_of_the_training_form_but_for_named_reasons(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, training = tokenizers[name], find_training_form(name)
    if training is None:
        assert name not in DIFFERENCES
        return
    found: set[str] = set()
    for case in list_working(name):
        tools, example = open_tools(tokenizer, case), make_example(case)
        oracle = tokenizer.apply_chat_template(
            CONVERSATIONS[case] if name == "deepseekv3" else spell_for_oracle(name, case),
            tools=list(example.tools) or None,
            chat_template=training,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        theirs = list_runs(tokenizer, oracle["input_ids"], oracle["assistant_masks"])
        encoded = tools.encode_conversation(example)
        ours = list_all_runs(tokenizer, encoded)
        turns = [index for index, turn in enumerate(example.messages) if turn["role"] == "assistant"]
        assert len(ours) == len(theirs) == len(turns)
        for index, own, other in zip(turns, ours, theirs, strict=True):
            prompt = tools.render(example.messages[:index], example.tools, prompt=True)
            found |= set(explain(own, other, prompt))
        if not found and len(encoded) == 1:  # where nothing differs in the text, nothing may differ in the tokens
            assert encoded[0].input_ids.tolist() == oracle["input_ids"][: len(encoded[0].input_ids)]
    assert "".join(sorted(found)) == DIFFERENCES[name]


def test_every_template_has_been_looked_at() -> None:
    # A new trl may ship new ones: each needs its entry here and a line on the page.
    with_training_form = {name for name in NAMES if find_training_form(name)}
    assert set(DIFFERENCES) == with_training_form - {"glm4moe"}
    assert set(REFUSED) | set(SEVERAL) | set(PINNED) <= set(NAMES)
    assert len(NAMES) >= 41


def make_row(name: str) -> str:
    """The line of a template on the page."""
    refused = REFUSED.get(name, {})
    marks = [
        "no" if case in refused else "each turn" if case in SEVERAL.get(name, ()) else "yes" for case in CONVERSATIONS
    ]
    differs = " ".join(DIFFERENCES[name]) or "nothing" if name in DIFFERENCES else "–"
    pinned = "yes" if name in PINNED else ""
    return f"| {name} | {' | '.join(marks)} | {pinned} | {differs} |"


def test_the_page_lists_exactly_these_templates_and_reasons() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (?!template|name)[a-z][a-z0-9_]* \|", line)]
    assert rows == [make_row(name) for name in NAMES]
    assert [line for line in page.splitlines() if re.match(r"\| [A-Z] \|", line)] == [
        f"| {letter} | {reason} |" for letter, reason in REASONS.items()
    ]


def test_a_pinned_option_is_part_of_the_template_and_of_every_prompt(tokenizers: dict[str, Any]) -> None:
    # Qwen3.5's small models close the thinking block in their prompt; rows with thinking need it open, also at inference.
    tokenizer = tokenizers["qwen3_5_nothink"]
    tools = open_tools(tokenizer, "thinks always")
    assert tools.template.source.endswith(tokenizer.chat_template)
    later = TokenizerUtils(tokenizer, tools.template)  # what a later script does with the saved template
    assert later.template == tools.template
    assert later.encode_prompt([FIRST]).tolist() == tools.encode_prompt([FIRST]).tolist()
    assert tools.render([FIRST], prompt=True).endswith("<think>\n")
    assert TokenizerUtils(tokenizer).render([FIRST], prompt=True).endswith("<think>\n\n</think>\n\n")


def test_thinking_is_read_from_its_field_and_from_the_content(tokenizers: dict[str, Any]) -> None:
    # DeepSeek's template drops both; Qwen3's reads both. The block in the content is how most published sets write it.
    for name in ("deepseek_r1_distill", "deepseekv3", "qwen3", "qwen3_5_think"):
        tools = open_tools(tokenizers[name], "thinks always")
        turns = (
            assistant("It is 4.", reasoning_content="Two and two."),
            assistant("<think>\nTwo and two.\n</think>\n\nIt is 4."),
            assistant("<think>Two and two.</think>It is 4."),
        )
        examples = [Example("messages", (FIRST, turn), None, "x:1", {}) for turn in turns]
        ids = [tools.encode_example(example).input_ids.tolist() for example in examples]
        assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize(
    ("shipped", "original"),
    [("llama3", "llama3"), ("phi", "phi3"), ("qwen", "qwen2_5"), ("gemma", "gemma3"), ("gemma", "gemma")],
)
def test_a_shipped_template_is_byte_for_byte_the_models(
    tokenizers: dict[str, Any], shipped: str, original: str
) -> None:
    tokenizer = tokenizers[original]
    ours, theirs = TokenizerUtils(tokenizer, shipped), TokenizerUtils(tokenizer)
    cases = {"qwen": ["single", "multi", "system", "tools"], "gemma": ["single", "multi", "system"]}
    for case in cases.get(shipped, sorted(CHAT)):
        if case in REFUSED.get(original, {}) and shipped != "qwen":
            continue  # Gemma 1 and 2 have no system role
        example = make_example(case)
        for messages, prompt in ((example.messages, False), (example.prompt, True)):
            text = ours.render(messages, example.tools, prompt=prompt)
            assert text == theirs.render(messages, example.tools, prompt=prompt)


def test_a_template_with_foreign_control_tokens_is_refused_with_those_that_fit(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        TokenizerUtils(tokenizers["qwen2_5"], "llama3")
    problem = caught.value.problems[0]
    assert problem.code == "template-tokens"
    assert "<|eot_id|>" in problem.message
    assert (problem.fix or "").endswith("alpaca, chatml, llama2, mistral, qwen, raw, vicuna, zephyr")
