"""What is known before weights are loaded: of the model's files, of pairs, and of keys that would be ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from config.recipe_io import load_recipe
from scripts import new_recipe
from utils.exceptions import ModelLoadingError, RecipeError, TunebookError
from utils.model_source import ModelSource
from utils.preflight import Preflight, check_recipe, summarise_preflight

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(12)
]


@pytest.fixture
def gpt2(embedded: ModelSource, tmp_path: Path) -> Path:
    """A tiny GPT-2 whose tokenizer brings a chat template."""
    return build_model(tmp_path / "tiny-gpt2-chat", embedded, "gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=512)


def build_model(folder: Path, embedded: ModelSource, model_type: str, **sizes: int) -> Path:
    """A random model with the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=49152, bos_token_id=1, eos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.folder / name, folder / name)
    return folder


def check(folder: Path, base: Path, rows: list[dict[str, Any]] = ROWS, **sections: Any) -> Preflight:
    """The pre-flight of a recipe on these rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name": str(base)},
        "data": {"train": str(folder / "rows.jsonl")},
        "lora": {},
        "training": {"method": "sft"},
        "generation": {"max_new_tokens": 16},
    }
    for name, given in sections.items():
        values[name] = {**values.get(name, {}), **given}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return check_recipe(load_recipe(path))


def find_line(folder: Path, key: str) -> str:
    """`file:line` of a key in the recipe of `check`."""
    lines = (folder / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    return f"{folder / 'recipe.yaml'}:{next(n for n, line in enumerate(lines, 1) if f'{key}:' in line.replace(chr(34), ''))}"


def test_a_model_of_a_family_that_cannot_chat_may_chat_with_a_template_of_its_own(gpt2: Path, tmp_path: Path) -> None:
    # The family decided, although the tokenizer lay there to be looked at.
    assert check(tmp_path, gpt2, data={"strategy": "chat", "max_length": 128}).tokenizer.strategy == "chat"
    arguments = ["--model", str(gpt2), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "new.yaml")]
    assert new_recipe.main(arguments) == 0
    assert load_recipe(tmp_path / "new.yaml").recipe.data.strategy == "chat"
    (gpt2 / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="gpt2 has no chat template"):
        check(tmp_path, gpt2, data={"strategy": "chat", "max_length": 128})


def test_a_new_recipe_that_is_refused_is_not_written(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 500}), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    out = tmp_path / "recipes" / "new.yaml"
    with pytest.raises(RecipeError, match="embeddings for 500 tokens"):
        new_recipe.main(["--model", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--out", str(out)])
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors files"),
        (lambda folder: cut_file(folder / "model.safetensors", 100), "ends 100 bytes too early"),
        (lambda folder: name_architecture(folder, "llama9"), "knows no architecture 'llama9'"),
    ],
    ids=["no weights", "truncated", "unknown architecture"],
)
def test_a_local_folder_that_cannot_be_trained_is_refused_before_training(
    tiny_llama: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    # validate.py called all three valid, and train.py failed.
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    check(tmp_path, folder)
    damage(folder)
    with pytest.raises(ModelLoadingError, match=words):
        check(tmp_path, folder)


def cut_file(path: Path, count: int) -> None:
    """Takes the last bytes of a file away, as a copy that broke off."""
    content = path.read_bytes()
    path.write_bytes(content[:-count])


def name_architecture(folder: Path, model_type: str) -> None:
    """Changes config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}), encoding="utf-8")


def test_a_revision_of_what_is_not_on_a_hub_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for model in (tiny_llama, Path("embedded/smollm2-135m-instruct")):
        with pytest.raises(RecipeError, match="revision 'main' does nothing") as caught:
            check(tmp_path, model, model={"revision": "main"})
        assert caught.value.problems[0].where == find_line(tmp_path, "revision")


def test_packing_is_refused_where_nobody_has_shown_that_examples_stay_apart(
    embedded: ModelSource, tiny_llama: Path, tmp_path: Path
) -> None:
    # In OPT, the second example of a packed row saw the first.
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    opt = build_model(tmp_path / "opt", embedded, "opt", **sizes, num_attention_heads=2)
    with pytest.raises(
        RecipeError, match="nobody has shown that opt keeps the examples of a packed row apart"
    ) as caught:
        check(tmp_path, opt, training={"packing": True})
    assert caught.value.problems[0].where == find_line(tmp_path, "packing")
    check(tmp_path, opt)
    check(tmp_path, tiny_llama, training={"packing": True})


def test_words_around_messages_are_warned_about_where_every_row_is_raw_text(tiny_llama: Path, tmp_path: Path) -> None:
    texts = [{"text": f"Number {n} follows the one before it."} for n in range(12)]
    data = {"strategy": "standard", "system": "Be short.", "loss_on": "last", "template": "raw"}
    codes = {problem.code for problem in check(tmp_path, tiny_llama, texts, data=data).warnings}
    assert {"text-system", "text-loss-on", "text-template"} <= codes
    codes = {problem.code for problem in check(tmp_path, tiny_llama, [*texts, *ROWS], data=data).warnings}
    assert not {"text-system", "text-loss-on", "text-template"} & codes


def test_a_pair_is_as_long_as_its_longer_conversation(tiny_llama: Path, tmp_path: Path) -> None:
    # Both answers behind one prompt were counted as one long row: limits and answer lengths came out twice as large.
    pairs = [{"prompt": f"Say {n}.", "chosen": "on " * 40, "rejected": "no " * 60} for n in range(12)]
    generation = {"max_new_tokens": 2048 - 64}
    preflight = check(tmp_path, tiny_llama, pairs, training={"method": "dpo"}, generation=generation)
    example = preflight.data.train[0]
    longest = int(preflight.data.train.path_lengths.max())
    assert example.path_length <= longest < len(example.input_ids)
    assert summarise_preflight(preflight)["longest_example"] == longest
    assert "answer-beyond-positions" not in {problem.code for problem in preflight.warnings}
    check(tmp_path, tiny_llama, pairs, training={"method": "dpo"}, data={"max_length": longest})
    out = tmp_path / "new.yaml"
    new_recipe.main(["--model", str(tiny_llama), "--data", str(tmp_path / "rows.jsonl"), "--out", str(out)])
    text, recipe = out.read_text(encoding="utf-8"), load_recipe(out).recipe
    assert f"the longest row has {longest} tokens" in text
    assert 0 <= recipe.data.max_length - longest < 64
    rejected = example.loss_mask[example.branch_starts[1] :].sum() if example.branch_starts else 0
    assert f"at most {rejected} tokens of a row are learned" in text


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("template", {"data": {"template": "nope.jinja"}}),
        ("template", {"data": {"template": "llama3"}}),
        ("strategy", {"data": {"strategy": "chat", "template": "auto"}}),
    ],
)
def test_a_template_that_cannot_be_taken_is_answered_with_its_line(
    tiny_llama: Path, tmp_path: Path, key: str, sections: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    if key == "strategy":
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(TunebookError) as caught:
        check(tmp_path, folder, **sections)
    assert caught.value.problems[0].where == find_line(tmp_path, key)


def test_a_corpus_with_a_control_token_is_answered_with_the_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the end <|endoftext|> and on. " * 40, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    lines = ["model: {name: tiny, init: scratch}", "scratch: {context: 16}", "data:", f"  train: {tmp_path}/corpus.txt"]
    recipe.write_text("\n".join([*lines, "training: {method: sft}"]), encoding="utf-8")
    with pytest.raises(TunebookError, match="control token") as caught:
        check_recipe(load_recipe(recipe))
    assert caught.value.problems[0].where == f"{recipe}:4"
