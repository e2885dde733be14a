"""What is learned is exactly the assistant's turns, with real tokenizers and the chat templates of the large families.

The oracle is the package trl: it ships each template twice, plain and with `{% generation %}` marks around what to learn.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from config.structured_config import ModelSection
from utils.data_formats import read_example
from utils.data_loading import Row
from utils.examples import Example
from utils.exceptions import DataError, ModelLoadingError, RecipeError
from utils.messages import Message
from utils.model_source import ModelSource, find_model
from utils.tokenizer_files import ensure_pad_token, load_tokenizer
from utils.tokenizer_utils import EncodedExample, TokenizerUtils, fit_length

TRL = importlib.util.find_spec("trl")
CHAT_TEMPLATES = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL else Path()  # type: ignore[index]
NEEDS_TRL = pytest.mark.skipif(TRL is None, reason="trl is not installed")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# template: (control tokens, bos, eos, what ends an assistant turn)
FAMILIES: dict[str, tuple[tuple[str, ...], str | None, str, str]] = {
    "llama3": (LLAMA_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama3_2": (LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "phi3": (
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|end|>",
    ),
    "qwen2_5": (QWEN_TOKENS, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (QWEN_TOKENS, None, "<|im_end|>", "<|im_end|>"),
    "gemma": (("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>"),
}
SINGLE = (("user", "What is 2 + 2?"), ("assistant", "It is 4."))
MULTI = (*SINGLE, ("user", "And 3 + 3?"), ("assistant", "That is 6,\nof course."))
CONVERSATIONS = {
    "single": SINGLE,
    "multi": MULTI,
    "system": (("system", "Be brief."), *SINGLE),
    "system_multi": (("system", "Be brief."), *MULTI),
}
PROMPTED = {
    **CONVERSATIONS,
    "newline_first": (("user", "Hi"), ("assistant", "\nHello")),
    "newlines_around": (("user", "Hi\n"), ("assistant", "\n\nHello\n\n")),
    "space_first": (("user", "2 + 2 ="), ("assistant", " 4")),
    "spaces_around": (*SINGLE, ("user", " Hi "), ("assistant", "  Hello  ")),
    "like_the_role": (("user", "assistant"), ("assistant", "assistant")),
    "like_a_letter": (("user", "m"), ("assistant", "m")),
    "like_the_terminator": (("user", "end"), ("assistant", "im_end")),
    "like_a_think_block": (("user", "think"), ("assistant", "think")),
    "same_answers": (("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")),
    "answer_in_the_question": (("user", "Say: Hello"), ("assistant", "Hello")),
    "other_alphabet": (("user", "Grüß dich 🎵"), ("assistant", "こんにちは 🎶")),
}


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return find_model(ModelSection(name="embedded/smollm2-135m-instruct"), "test", with_weights=True).folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    """The embedded model's tokenizer; shared, so never changed by a test."""
    return load_tokenizer(model_folder)


@pytest.fixture
def own_tokenizer(model_folder: Path) -> Any:
    """A tokenizer that the test may change."""
    return load_tokenizer(model_folder)


@pytest.fixture(scope="session")
def base_tokenizer() -> Any:
    """A tokenizer as base models of GPT-2's kind have it: end-of-text is its only control token, and no pad."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Once upon a time there was a tune."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def make_family_tokenizer(folder: Path, family: str) -> Any:
    """The real tokenizer with the control tokens and the chat template of a family."""
    tokens, bos, eos, _ = FAMILIES[family]
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, eos
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    if bos is not None:  # what the tokenizers of these families do when they are called
        bos_id = tokenizer.convert_tokens_to_ids(bos)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_id)]
        )
        assert tokenizer("x").input_ids[0] == bos_id
    return tokenizer


@pytest.fixture(scope="session")
def family_tokenizers(model_folder: Path) -> dict[str, Any]:
    return {family: make_family_tokenizer(model_folder, family) for family in FAMILIES}


def make_messages(turns: tuple[tuple[str, str], ...]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def make_example(turns: tuple[tuple[str, str], ...], name: str = "messages") -> Example:
    return Example(name, make_messages(turns), None, "rows.jsonl:7", {})  # type: ignore[arg-type]


def read(fields: dict[str, Any]) -> Example:
    return read_example(Row(fields, "rows.jsonl:7"), "auto")


def find_learned(tokenizer: Any, encoded: EncodedExample) -> list[str]:
    """The text of each run of learned tokens."""
    runs: list[list[int]] = []
    previous = False
    for index, learned in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if learned:
            runs = runs if previous else [*runs, []]
            runs[-1].append(int(index))
        previous = bool(learned)
    return [tokenizer.decode(run) for run in runs]


def supports(family: str, conversation: str) -> bool:
    return not (family == "gemma" and conversation.startswith("system"))


@NEEDS_TRL
@pytest.mark.parametrize("conversation", PROMPTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_beginning_of_the_example_and_nothing_of_it_is_learned(
    family_tokenizers: dict[str, Any], family: str, conversation: str
) -> None:
    if not supports(family, conversation):
        pytest.skip("Gemma has no system role")
    tools, example = TokenizerUtils(family_tokenizers[family], loss_on="last"), make_example(PROMPTED[conversation])
    prompt, encoded = tools.encode_prompt(example.prompt), tools.encode_example(example)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert not encoded.loss_mask[: len(prompt)].any()
    assert encoded.loss_mask[len(prompt) :].all()


@pytest.mark.parametrize("conversation", PROMPTED)
@pytest.mark.parametrize("template", ["auto", "chatml", "raw", "alpaca"])
def test_the_prompt_is_the_beginning_of_the_example_under_our_own_templates(
    tokenizer: Any, template: str, conversation: str
) -> None:
    tools, example = TokenizerUtils(tokenizer, template=template, loss_on="last"), make_example(PROMPTED[conversation])
    prompt, encoded = tools.encode_prompt(example.prompt), tools.encode_example(example)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(encoded.input_ids) - len(prompt))


@NEEDS_TRL
@pytest.mark.parametrize("conversation", PROMPTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_learned_turn_is_its_answer_and_its_terminator(
    family_tokenizers: dict[str, Any], family: str, conversation: str
) -> None:
    if not supports(family, conversation):
        pytest.skip("Gemma has no system role")
    tokenizer, end, turns = family_tokenizers[family], FAMILIES[family][3], PROMPTED[conversation]
    encoded = TokenizerUtils(tokenizer).encode_conversation(make_example(turns))
    runs = [run for one in encoded for run in find_learned(tokenizer, one)]
    answers = [content for role, content in turns if role == "assistant"]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        assert run.endswith(end)
        learned = run.removesuffix(end).replace("<think>\n\n</think>\n\n", "")
        assert learned.strip() == answer.strip()
        assert end not in learned


@NEEDS_TRL
@pytest.mark.parametrize("family", FAMILIES)
def test_a_generation_stops_at_the_terminator_and_at_eos(family_tokenizers: dict[str, Any], family: str) -> None:
    tokenizer, (_, _, eos, end) = family_tokenizers[family], FAMILIES[family]
    assert set(TokenizerUtils(tokenizer).find_stop_ids()) == set(tokenizer.convert_tokens_to_ids([eos, end]))


@NEEDS_TRL
@pytest.mark.parametrize("family", ["llama3", "llama3_2", "gemma"])
@pytest.mark.parametrize("template", ["auto", "raw", "alpaca"])
def test_there_is_exactly_one_bos_whether_or_not_the_template_writes_it(
    family_tokenizers: dict[str, Any], family: str, template: str
) -> None:
    tokenizer = family_tokenizers[family]
    tools = TokenizerUtils(tokenizer, template=template)
    encoded = tools.encode_example(make_example(MULTI))
    for ids in (encoded.input_ids, tools.encode_prompt(make_messages(MULTI[:-1]))):
        assert ids[0] == tokenizer.bos_token_id
        assert (ids == tokenizer.bos_token_id).sum() == 1
    assert not encoded.loss_mask[0]


@NEEDS_TRL
def test_raw_text_gets_the_bos_that_its_tokenizer_adds(family_tokenizers: dict[str, Any]) -> None:
    tokenizer = family_tokenizers["llama3"]
    encoded = TokenizerUtils(tokenizer).encode_example(read({"text": "Once upon a time"}))
    assert encoded.input_ids[:-1].tolist() == tokenizer("Once upon a time").input_ids
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)


def test_the_models_own_template_is_encoded_as_transformers_does(tokenizer: Any) -> None:
    encoded = TokenizerUtils(tokenizer).encode_example(make_example(MULTI))
    expected = tokenizer.apply_chat_template(list(make_messages(MULTI)), tokenize=True, return_dict=True)["input_ids"]
    assert encoded.input_ids.tolist() == expected[:-1]
    assert tokenizer.decode(expected[-1:]) == "\n"
    assert find_learned(tokenizer, encoded) == ["It is 4.<|im_end|>", "That is 6,\nof course.<|im_end|>"]
    assert encoded.where == "rows.jsonl:7"
    assert encoded.input_ids.dtype == np.int64
    assert encoded.loss_mask.dtype == np.bool_


def test_a_pad_token_that_is_eos_does_not_unlearn_the_terminator(tokenizer: Any) -> None:
    # Collators that mask by `input_ids == pad_token_id` never teach such a model to stop.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = TokenizerUtils(tokenizer).encode_example(make_example(SINGLE))
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.loss_mask[-1]


def test_loss_on_chooses_the_turns(tokenizer: Any) -> None:
    example = make_example(MULTI)
    encoded = {
        name: TokenizerUtils(tokenizer, loss_on=name).encode_example(example) for name in ("assistant", "last", "all")
    }
    assert find_learned(tokenizer, encoded["assistant"]) == ["It is 4.<|im_end|>", "That is 6,\nof course.<|im_end|>"]
    assert find_learned(tokenizer, encoded["last"]) == ["That is 6,\nof course.<|im_end|>"]
    assert encoded["all"].loss_mask[1:].all()
    assert encoded["all"].supervised_tokens == len(encoded["all"].input_ids) - 1
    assert encoded["all"].input_ids.tolist() == encoded["assistant"].input_ids.tolist()


def test_supervised_tokens_leave_out_the_first_which_nothing_predicts() -> None:
    assert EncodedExample(np.arange(4), np.array([True, False, True, True]), "x").supervised_tokens == 2


CONTROL = ["<|im_end|>", "a <|im_start|>user b", "<|endoftext|>", "x<file_sep>"]


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_control_token_inside_a_message_is_refused_with_its_row(tokenizer: Any, role: str, text: str) -> None:
    turns = tuple((who, text if who == role else content) for who, content in CONVERSATIONS["system"])
    with pytest.raises(DataError) as caught:
        TokenizerUtils(tokenizer).encode_example(make_example(turns))
    assert caught.value.problems[0].code == "control-token"
    assert caught.value.problems[0].where == "rows.jsonl:7"


@pytest.mark.parametrize("text", CONTROL)
def test_a_control_token_inside_raw_text_or_a_prompt_is_refused(tokenizer: Any, text: str) -> None:
    tools = TokenizerUtils(tokenizer)
    with pytest.raises(DataError, match=r"rows.jsonl:7.*control token"):
        tools.encode_example(read({"text": text}))
    with pytest.raises(DataError, match="control token"):
        tools.encode_prompt(make_messages((("user", text),)))


@pytest.mark.parametrize("column", ["instruction", "input", "output", "system"])
def test_a_control_token_inside_an_alpaca_row_is_refused(tokenizer: Any, column: str) -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "system": "d", column: "x<|im_end|>"}
    with pytest.raises(DataError, match="control token"):
        TokenizerUtils(tokenizer, template="alpaca").encode_example(read(row))


def test_a_control_token_inside_the_recipes_system_message_is_refused(tokenizer: Any) -> None:
    # Only the row's own messages were looked at; `data.system` could end its own turn in every row.
    with pytest.raises((DataError, RecipeError), match="control token"):
        TokenizerUtils(tokenizer, system="Be brief.<|im_end|>").encode_example(make_example(SINGLE))


def test_a_control_token_cannot_be_spelled_by_two_neighbours(tokenizer: Any) -> None:
    # Each part is harmless alone; written behind each other by `raw` they spell <|im_end|>.
    with pytest.raises(DataError, match="control token"):
        TokenizerUtils(tokenizer, template="raw").encode_example(
            make_example((("user", "a<|im_"), ("assistant", "end|>b")))
        )


def test_a_control_token_cannot_be_spelled_by_system_and_prompt(tokenizer: Any) -> None:
    # Neighbours inside one segment are joined before they are tokenised, so they have to be looked at as rendered.
    turns = (("system", "a<|im_"), ("user", "end|>b"), ("assistant", "c"))
    with pytest.raises(DataError, match="control token"):
        TokenizerUtils(tokenizer, template="raw").encode_example(make_example(turns))


@pytest.mark.parametrize("text", ["half a pair \ud83d", "\udc00"])
def test_half_a_surrogate_pair_is_a_bad_row_and_no_crash(text: str) -> None:
    # JSON can write half a pair as an escape; the tokenizer then fails with a TypeError that names no row.
    with pytest.raises(DataError, match="half of a character"):
        read({"prompt": text, "completion": "a"})


def test_raw_runs_the_prompt_straight_into_its_completion(tokenizer: Any) -> None:
    tools = TokenizerUtils(tokenizer, template="raw")
    encoded = tools.encode_example(read({"prompt": "2 + 2 =", "completion": " 4"}))
    assert tokenizer.decode(encoded.input_ids) == "2 + 2 = 4<|im_end|>"
    assert find_learned(tokenizer, encoded) == [" 4<|im_end|>"]


# Stanford Alpaca's train.py, PROMPT_DICT, word for word; its target is the output and eos directly behind it.
STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
STANFORD_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@pytest.mark.parametrize("given", ["cheese", ""])
def test_the_alpaca_template_is_stanfords_text(tokenizer: Any, given: str) -> None:
    tools = TokenizerUtils(tokenizer, template="alpaca")
    row = {"instruction": "Translate to French.", "input": given, "output": "fromage"}
    encoded = tools.encode_example(read(row))
    prompt = (STANFORD_INPUT if given else STANFORD_NO_INPUT).format_map(row)
    # The line break behind «### Response:» is not in Stanford's train.py, but in its model's training data and in what
    # everybody uses since, so it is allowed here; every other character must be Stanford's.
    text = tokenizer.decode(encoded.input_ids)
    assert text.replace("### Response:\n", "### Response:") == f"{prompt}fromage<|im_end|>"
    assert find_learned(tokenizer, encoded) == ["fromage<|im_end|>"]


def test_alpaca_rows_take_the_alpaca_template_where_there_is_no_chat_template(own_tokenizer: Any) -> None:
    own_tokenizer.chat_template = None
    encoded = TokenizerUtils(own_tokenizer).encode_example(read({"instruction": "Sing.", "output": "La"}))
    assert own_tokenizer.decode(encoded.input_ids).startswith("Below is an instruction that describes a task. Write")


def test_completions_take_the_raw_template_where_there_is_no_chat_template(own_tokenizer: Any) -> None:
    own_tokenizer.chat_template = None
    tools = TokenizerUtils(own_tokenizer, row_formats=("prompt_completion",))
    encoded = tools.encode_example(read({"prompt": "2 + 2 =", "completion": " 4"}))
    assert own_tokenizer.decode(encoded.input_ids) == "2 + 2 = 4<|im_end|>"


def test_strategy_standard_sets_the_chat_template_aside(tokenizer: Any) -> None:
    tools = TokenizerUtils(tokenizer, strategy="standard")
    assert tools.strategy == "standard"
    assert tools.template.name == "alpaca"
    raw = TokenizerUtils(tokenizer, strategy="standard", row_formats=("prompt_completion", "text"))
    assert raw.render(make_messages(SINGLE)) == "What is 2 + 2?It is 4.<|im_end|>"
    assert TokenizerUtils(tokenizer).strategy == "chat"


def test_chatml_writes_each_role_between_its_marks(tokenizer: Any) -> None:
    tools = TokenizerUtils(tokenizer, template="chatml")
    assert tools.render(make_messages(CONVERSATIONS["system"])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )
    assert tools.render(make_messages(SINGLE[:1]), prompt=True) == (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_is_refused_for_a_tokenizer_without_its_tokens(base_tokenizer: Any) -> None:
    # <|im_end|> would fall apart into letters, and no single token would end a turn.
    with pytest.raises(RecipeError, match=r"<.im_start.> <.im_end.>") as caught:
        TokenizerUtils(base_tokenizer, template="chatml")
    assert caught.value.problems[0].code == "template-tokens"
    assert (caught.value.problems[0].fix or "").endswith(": alpaca, llama2, mistral, raw, vicuna, zephyr")


def write_template(tmp_path: Path, source: str) -> str:
    path = tmp_path / "my.jinja"
    path.write_text(source, encoding="utf-8")
    return str(path)


BEGINNING = "{% for m in messages %}<|im_start|>{{ m.role }}: "
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"


def test_a_template_may_be_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = write_template(tmp_path, BEGINNING + "{{ m.content }}<|im_end|>{% endfor %}" + PROMPT)
    encoded = TokenizerUtils(tokenizer, template=path).encode_example(make_example(SINGLE))
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>user: What is 2 + 2?<|im_end|><|im_start|>assistant: It is 4.<|im_end|>"
    )
    assert find_learned(tokenizer, encoded) == ["It is 4.<|im_end|>"]


BAD_TEMPLATES = {
    "hides the answer": (
        BEGINNING + "{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
        "template-hides",
    ),
    "rewrites the answer": (BEGINNING + "{{ m.content | upper }}<|im_end|>{% endfor %}", "template-hides"),
    "cuts the answer": (BEGINNING + "{{ m.content[:3] }}<|im_end|>{% endfor %}", "template-hides"),
    "has no terminator": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no-terminator"),
    "counts the messages first": (
        "{{ messages | length }}" + BEGINNING + "{{ m.content }}<|im_end|>{% endfor %}",
        "template-prefix",
    ),
    "begins an answer in another way than its prompt": (
        "{% for m in messages %}<|im_start|>{{ 'bot' if m.role == 'assistant' else m.role }}: "
        "{{ m.content }}<|im_end|>{% endfor %}",
        "template-prefix",
    ),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_would_be_masked_wrongly_is_refused_with_the_row(
    tokenizer: Any, tmp_path: Path, name: str
) -> None:
    source, code = BAD_TEMPLATES[name]
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}" if code == "no-terminator" else PROMPT
    with pytest.raises(DataError) as caught:
        TokenizerUtils(tokenizer, template=write_template(tmp_path, source + prompt)).encode_example(
            make_example(SINGLE)
        )
    assert caught.value.problems[0].code == code
    assert caught.value.problems[0].where == "rows.jsonl:7"


def test_a_template_that_rewrites_history_gets_a_sequence_for_each_turn(tokenizer: Any, tmp_path: Path) -> None:
    # As reasoning templates do: an answer looks different as soon as another turn follows it.
    content = "{% if m.role == 'assistant' and not loop.last %}(old){% else %}{{ m.content }}{% endif %}"
    source = BEGINNING + content + "<|im_end|>{% endfor %}"
    tools = TokenizerUtils(tokenizer, template=write_template(tmp_path, source + PROMPT))
    assert len(tools.encode_conversation(make_example(SINGLE))) == 1
    first, second = tools.encode_conversation(make_example(MULTI))
    assert find_learned(tokenizer, first) == ["It is 4.<|im_end|>"]
    assert find_learned(tokenizer, second) == ["That is 6,\nof course.<|im_end|>"]
    assert "(old)" in tokenizer.decode(second.input_ids)
    assert tools.encode_example(make_example(MULTI)).input_ids.tolist() == second.input_ids.tolist()


def test_under_loss_on_last_and_all_a_rewritten_history_is_one_sequence(tokenizer: Any, tmp_path: Path) -> None:
    content = "{% if m.role == 'assistant' and not loop.last %}(old){% else %}{{ m.content }}{% endif %}"
    path = write_template(tmp_path, BEGINNING + content + "<|im_end|>{% endfor %}" + PROMPT)
    for policy in ("last", "all"):
        (encoded,) = TokenizerUtils(tokenizer, path, loss_on=policy).encode_conversation(make_example(MULTI))
        assert "(old)" in tokenizer.decode(encoded.input_ids)
        assert encoded.loss_mask[-1]
        assert encoded.loss_mask.all() == (policy == "all")


def test_a_template_that_ends_only_its_last_turn_teaches_each_turn_to_end(tokenizer: Any, tmp_path: Path) -> None:
    # The first control token behind turn 1 is then the mark of the next user: learning it would teach the model to go on
    # as the user, since generation does not stop there.
    source = (
        BEGINNING + "{{ m.content }}\n{% endfor %}" + PROMPT + "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    )
    tools = TokenizerUtils(tokenizer, template=write_template(tmp_path, source))
    runs = [find_learned(tokenizer, encoded) for encoded in tools.encode_conversation(make_example(MULTI))]
    assert runs == [["It is 4.\n<|im_end|>"], ["That is 6,\nof course.\n<|im_end|>"]]


@pytest.mark.parametrize("source", ["{{ messages[0].nothing.at_all }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_a_template_that_fails_is_an_error_with_its_row(tokenizer: Any, tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError) as caught:
        TokenizerUtils(tokenizer, template=write_template(tmp_path, source)).encode_example(make_example(SINGLE))
    assert caught.value.problems[0].code == "template"
    assert caught.value.problems[0].where == "rows.jsonl:7"


@NEEDS_TRL
def test_a_system_message_that_the_template_refuses_is_an_error_with_its_row(family_tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7.*System role not supported"):
        TokenizerUtils(family_tokenizers["gemma"]).encode_example(make_example(CONVERSATIONS["system"]))


def test_strategy_chat_without_a_chat_template_is_refused(own_tokenizer: Any) -> None:
    own_tokenizer.chat_template = None
    with pytest.raises(RecipeError) as caught:
        TokenizerUtils(own_tokenizer, strategy="chat")
    assert caught.value.problems[0].code == "no-chat-template"
    assert "standard" in (caught.value.problems[0].fix or "")


def test_the_recipes_system_message_comes_only_where_the_row_has_none(tokenizer: Any) -> None:
    tools = TokenizerUtils(tokenizer, system="Talk like a pirate.")
    without = tokenizer.decode(tools.encode_example(make_example(SINGLE)).input_ids)
    assert without.startswith("<|im_start|>system\nTalk like a pirate.<|im_end|>\n<|im_start|>user\nWhat")
    own = tokenizer.decode(tools.encode_example(make_example(CONVERSATIONS["system"])).input_ids)
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "pirate" not in own
    prompt = tokenizer.decode(tools.encode_prompt(make_messages(SINGLE[:1])))
    assert without.startswith(prompt)


def test_text_rows_are_learned_whole_and_end_with_eos(tokenizer: Any) -> None:
    encoded = TokenizerUtils(tokenizer, system="ignored").encode_example(read({"text": "Once upon a time"}))
    assert encoded.input_ids.tolist() == [*tokenizer("Once upon a time").input_ids, tokenizer.eos_token_id]
    assert encoded.loss_mask.all()


def make_encoded(mask: str) -> EncodedExample:
    learned = np.array([sign == "x" for sign in mask])
    return EncodedExample(np.arange(100, 100 + len(mask)), learned, "x:1")


@pytest.mark.parametrize(
    ("mask", "max_length", "expected"),
    [
        ("....xx", 6, range(6)),
        ("....xx", 9, range(6)),
        ("....xx", 5, range(1, 6)),
        ("....xx", 3, range(3, 6)),  # the answer and the token that predicts its first one
        ("....xx", 2, None),
        # A learned token in column 1 was taken for raw text, so the end of the last answer was cut away in silence.
        (".x.xx", 4, None),
        ("..x.xx", 5, range(1, 6)),
        ("xxxxxx", 4, None),  # loss_on all: nothing can go without losing what is learned
    ],
)
def test_a_long_example_loses_its_beginning_but_nothing_that_is_learned(
    mask: str, max_length: int, expected: range | None
) -> None:
    encoded = make_encoded(mask)
    fitted = fit_length(encoded, max_length)
    if expected is None:
        assert fitted is None
        return
    assert fitted is not None
    assert fitted.input_ids.tolist() == [100 + index for index in expected]
    assert fitted.loss_mask.tolist() == [mask[index] == "x" for index in expected]
    assert len(fitted.input_ids) <= max_length


def test_truncating_a_conversation_keeps_every_learned_token(tokenizer: Any) -> None:
    question = "Where is Oslo? " * 30
    encoded = TokenizerUtils(tokenizer).encode_example(make_example((("user", question), ("assistant", "In Norway."))))
    fitted = fit_length(encoded, 40)
    assert fitted is not None
    assert len(fitted.input_ids) == 40
    assert fitted.supervised_tokens == encoded.supervised_tokens
    assert find_learned(tokenizer, fitted) == ["In Norway.<|im_end|>"]
    assert fit_length(encoded, encoded.supervised_tokens) is None


def test_truncating_never_cuts_the_end_of_a_completion(tokenizer: Any) -> None:
    # With a prompt of one token the row was taken for raw text: its terminator was cut away, and nobody was told.
    tools = TokenizerUtils(tokenizer, template="raw")
    encoded = tools.encode_example(read({"prompt": "Hi", "completion": " there" * 20}))
    assert encoded.loss_mask[:2].tolist() == [False, True]
    assert fit_length(encoded, 10) is None


def test_a_tokenizer_without_pad_gets_one_from_its_own_vocabulary(own_tokenizer: Any) -> None:
    size, eos = len(own_tokenizer), own_tokenizer.eos_token_id
    own_tokenizer.pad_token = None
    ensure_pad_token(own_tokenizer)
    assert own_tokenizer.pad_token == "<|endoftext|>"
    assert len(own_tokenizer) == size
    assert own_tokenizer.eos_token_id == eos


def test_a_pad_token_that_is_there_is_kept(own_tokenizer: Any) -> None:
    before = own_tokenizer.pad_token
    ensure_pad_token(own_tokenizer)
    assert own_tokenizer.pad_token == before


def test_pad_falls_back_to_eos_where_no_reserved_token_is_left(base_tokenizer: Any) -> None:
    own = copy.deepcopy(base_tokenizer)
    assert own.pad_token is None
    ensure_pad_token(own)
    assert own.pad_token_id == own.eos_token_id
    assert len(own) == len(base_tokenizer)


def test_a_base_models_tokenizer_encodes_every_format(base_tokenizer: Any) -> None:
    tools = TokenizerUtils(base_tokenizer)
    assert tools.strategy == "standard"
    rows: list[dict[str, Any]] = [
        {"prompt": "a =", "completion": " b"},
        {"instruction": "a", "output": "b"},
        {"text": "Once"},
    ]
    for row in rows:
        encoded = tools.encode_example(read(row))
        assert encoded.input_ids[-1] == base_tokenizer.eos_token_id
        assert encoded.loss_mask[-1]
        assert (encoded.input_ids == base_tokenizer.eos_token_id).sum() == 1
    assert tools.find_stop_ids() == [base_tokenizer.eos_token_id]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.exit_code == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_is_an_error_with_its_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadingError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.problems[0].where == str(tmp_path)


def test_the_hash_of_a_template_changes_with_its_text(tokenizer: Any) -> None:
    names = ("auto", "chatml", "alpaca", "raw")
    assert len({TokenizerUtils(tokenizer, template=name).template.hash for name in names}) == 4


def test_the_hash_changes_with_everything_that_changes_an_encoding(own_tokenizer: Any) -> None:
    # A token cache whose key misses one of these is reused although its tokens are wrong.
    options: list[dict[str, Any]] = [{}, {"template": "chatml"}, {"loss_on": "last"}, {"system": "a"}, {"system": "b"}]
    hashes = [TokenizerUtils(own_tokenizer, **given).hash for given in options]
    assert hashes[0] == TokenizerUtils(own_tokenizer).hash
    own_tokenizer.add_tokens(["<new>"], special_tokens=True)
    hashes.append(TokenizerUtils(own_tokenizer).hash)
    assert len(set(hashes)) == 6


def test_decoding_leaves_control_tokens_out(tokenizer: Any) -> None:
    tools = TokenizerUtils(tokenizer)
    assert tools.decode(tokenizer("It is 4.<|im_end|>").input_ids) == "It is 4."


def test_encoding_does_not_import_torch(model_folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from utils.examples import Example
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import TokenizerUtils
messages = ({{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}})
tools = TokenizerUtils(load_tokenizer(Path({str(model_folder)!r})))
assert tools.encode_example(Example("messages", messages, None, "x:1", {{}})).supervised_tokens == 2
tools.find_stop_ids()
print(sorted(name for name in ("torch", "mlx.core", "tensorflow", "jax") if name in sys.modules))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_raw_text_that_is_too_long_loses_its_end() -> None:
    fitted = fit_length(replace(make_encoded(".xxxxx"), is_text=True), 4)
    assert fitted is not None
    assert fitted.input_ids.tolist() == [100, 101, 102, 103]


def test_a_batch_gives_what_one_by_one_gives_and_errors_in_their_places(tokenizer: Any) -> None:
    tools = TokenizerUtils(tokenizer)
    good = [make_example(turns) for turns in PROMPTED.values()]
    bad = make_example((("user", "a<|im_end|>"), ("assistant", "b")))
    results = tools.encode_batch([*good[:3], bad, *good[3:], read({"text": "Once"})])
    error = results.pop(3)
    assert isinstance(error, DataError)
    assert error.problems[0].code == "control-token"
    assert error.problems[0].where == "rows.jsonl:7"
    for example, result in zip([*good, read({"text": "Once"})], results, strict=True):
        assert isinstance(result, list)
        for one, other in zip(result, tools.encode_conversation(example), strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.loss_mask.tolist() == other.loss_mask.tolist()
            assert one.is_text == other.is_text


def test_truncation_and_padding_in_a_tokenizers_file_change_nothing(own_tokenizer: Any) -> None:
    # Files saved after a training often ask for both; answers were cut at the length of that training.
    expected = TokenizerUtils(own_tokenizer).encode_example(make_example(MULTI)).input_ids.tolist()
    tools = TokenizerUtils(own_tokenizer)
    own_tokenizer.backend_tokenizer.enable_truncation(5)
    own_tokenizer.backend_tokenizer.enable_padding(length=500)
    assert tools.encode_example(make_example(MULTI)).input_ids.tolist() == expected
    assert TokenizerUtils(own_tokenizer).hash == tools.hash


def make_prefixing_tokenizer() -> Any:
    """A tokenizer that puts a space before every text and after every control token, as Llama 2's does."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator(["[INST] What is it? [/INST] It is what it is. [INST] Hi [/INST] Hello"] * 9, trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", ["zephyr", "mistral"])
def test_a_tokenizer_that_puts_a_space_before_each_text_gets_no_spaces_inside(template: str) -> None:
    # Prompt and answer are encoded apart: the answer got a second space in front, which inference never sees.
    tokenizer = make_prefixing_tokenizer()
    tools = TokenizerUtils(tokenizer, template)
    example = make_example(
        (("user", "What is it?"), ("assistant", "It is what it is."), ("user", "Hi"), ("assistant", "Hello"))
    )
    encoded = tools.encode_example(example)
    whole = tokenizer(tools.render(example.messages), add_special_tokens=False).input_ids
    whole = whole if whole[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *whole]
    assert encoded.input_ids.tolist() == whole[: len(encoded.input_ids)]
    prompt = tools.encode_prompt(example.prompt)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.loss_mask[-1]


def test_a_row_that_would_begin_with_two_begin_of_text_tokens_is_refused() -> None:
    tokenizer = make_prefixing_tokenizer()
    source = (
        "<s>{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="two begin-of-text") as caught:
        TokenizerUtils(tokenizer, source).encode_example(make_example(SINGLE))
    assert caught.value.problems[0].code == "two-bos"


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_leaves_out_what_was_asked_is_refused(tokenizer: Any, role: str) -> None:
    # The answer is there, so the mask is right; but the model would learn to answer what it cannot see.
    source = (
        BEGINNING + f"{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}<|im_end|>{{% endfor %}}" + PROMPT
    )
    tools = TokenizerUtils(tokenizer, source)
    with pytest.raises(DataError, match=rf"leaves out .* \({role}\)") as caught:
        tools.encode_example(make_example(CONVERSATIONS["system"]))
    assert caught.value.problems[0].code == "template-hides"


CALL = {"type": "function", "function": {"name": "play", "arguments": {"tune": "Greensleeves"}}}
TOOL = {"type": "function", "function": {"name": "play", "description": "Plays.", "parameters": {}}}


def make_tool_example(**changes: Any) -> Example:
    """A conversation with a tool; `changes` puts a text into one of its places."""
    places = {"name": "play", "argument": "Greensleeves", "result": "done", "reasoning": "Hm.", "description": "Plays."}
    places |= changes
    call = {"type": "function", "function": {"name": places["name"], "arguments": {"tune": places["argument"]}}}
    messages = (
        {"role": "user", "content": "Play it."},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": places["reasoning"]},
        {"role": "tool", "content": places["result"], "name": "play"},
        {"role": "assistant", "content": "Played."},
    )
    tool = {"type": "function", "function": {**TOOL["function"], "description": places["description"]}}  # type: ignore[dict-item]
    return Example("messages", messages, None, "rows.jsonl:7", {}, (tool,))


@pytest.mark.parametrize("place", ["name", "argument", "result", "reasoning", "description"])
def test_a_control_token_in_any_part_of_a_tool_conversation_is_refused(tokenizer: Any, place: str) -> None:
    with pytest.raises(DataError, match="control token") as caught:
        TokenizerUtils(tokenizer).encode_example(make_tool_example(**{place: "x<|im_end|>"}))
    assert caught.value.problems[0].where == "rows.jsonl:7"


def test_a_template_without_tools_refuses_a_tool_call_with_the_way_out(tokenizer: Any) -> None:
    example = make_tool_example(reasoning="")
    with pytest.raises(DataError, match="hides or rewrites the tool call of turn 2") as caught:
        TokenizerUtils(tokenizer).encode_example(example)
    assert "data.template" in (caught.value.problems[0].fix or "")


def test_the_qwen_template_shows_tools_and_their_calls(tokenizer: Any) -> None:
    tools, example = TokenizerUtils(tokenizer, "qwen"), make_tool_example(reasoning="")
    encoded = tools.encode_example(example)
    call, answer = find_learned(tokenizer, encoded)
    assert call == '<tool_call>\n{"name": "play", "arguments": {"tune": "Greensleeves"}}\n</tool_call><|im_end|>'
    assert answer == "Played.<|im_end|>"
    assert '"description": "Plays."' in tokenizer.decode(encoded.input_ids)
    prompt = tools.encode_prompt(example.prompt, example.tools)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()


def test_three_thousand_short_rows_are_encoded_in_seconds(tokenizer: Any) -> None:
    # About 4,400 rows a second on one core; transformers' own calls made it a few hundred. The limit is generous.
    rows = [make_example((("user", f"What is {n} + 2?"), ("assistant", f"It is {n + 2}."))) for n in range(3000)]
    tools = TokenizerUtils(tokenizer)
    start = time.process_time()
    assert all(isinstance(result, list) for result in tools.encode_batch(rows))
    assert time.process_time() - start < 6


def test_a_role_token_that_is_not_marked_as_special_is_a_control_token_all_the_same(embedded: ModelSource) -> None:
    # DeepSeek-R1's distilled Qwen models hold their role tokens as ordinary added tokens: a message could begin a turn.
    tokenizer = load_tokenizer(embedded.folder)
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>"])
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    utils = TokenizerUtils(tokenizer, template=template)
    with pytest.raises(DataError, match="control token <｜User｜>"):
        utils.encode_prompt([{"role": "user", "content": "hi<｜User｜>go on"}])
    assert len(utils.encode_prompt([{"role": "user", "content": "hi"}])) > 2


def make_tool_row(**answer: Any) -> Example:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sunny.", **answer}]
    return read_example(Row({"messages": turns, "tools": [tool]}, "x:1"), "auto")


def test_a_template_that_hides_the_tools_of_a_row_is_refused(embedded: ModelSource) -> None:
    with pytest.raises(DataError, match="does not show the tools of this row: 'get_weather'"):
        TokenizerUtils(load_tokenizer(embedded.folder)).encode_example(make_tool_row())


def test_a_template_that_hides_the_arguments_of_a_call_is_refused(embedded: ModelSource) -> None:
    template = (
        "{{ tools }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}<|im_end|>{% endif %}{% endfor %}"
    )
    utils = TokenizerUtils(load_tokenizer(embedded.folder), template=template)
    call = {"name": "get_weather", "arguments": {"city": "Rome"}}
    with pytest.raises(DataError, match="arguments of a tool call of turn 2: 'Rome' is missing"):
        utils.encode_example(make_tool_row(tool_calls=[call]))


def test_a_cut_prompt_keeps_its_begin_of_text_token() -> None:
    # Llama and Gemma put one in front of everything; a row cut to its tail had lost it.
    encoded = make_encoded(".......xx")
    fitted = fit_length(encoded, 6, bos_token_id=int(encoded.input_ids[0]))
    assert fitted is not None
    assert fitted.input_ids.tolist() == [encoded.input_ids[0], *encoded.input_ids[4:]]
    assert fitted.loss_mask.tolist() == [False, *encoded.loss_mask[4:]]
    assert (
        fit_length(encoded, 3, bos_token_id=int(encoded.input_ids[0])) is None
    )  # nothing before the answer would be left
    assert fit_length(encoded, 3) is not None
