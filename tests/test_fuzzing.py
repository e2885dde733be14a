"""Readers of strangers' files under random damage: an answer or an error of ours, at once, and never a changed file.

The examples are the same every time (`derandomize`), so that a failure is one for everybody.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from config.recipe_io import load_recipe
from config.structured_config import DataSection, ModelSection
from tests.bad_inputs.build_tree import RECIPE, hash_tree, make_rows, write_good_tree, write_parquet
from utils.adapter_source import find_adapter
from utils.checkpoint import MANIFEST, OPTIMIZER, STATE, Checkpoint, read_checkpoint, save_checkpoint, write_manifest
from utils.exceptions import DataError, Problem, RecipeError, TunebookError
from utils.model_shape import refuse_oversized
from utils.model_source import find_model
from utils.plain_adapters import read_mlx_adapter, read_peft_adapter
from utils.row_checks import scan_rows
from utils.run_folder import RunFolder, find_run
from utils.seed_manager import capture_generators, restore_generators
from utils.session import read_prompts
from utils.tensor_files import read_tensor_file
from utils.tokenizer_files import load_tokenizer
from utils.training_state import TrainingState

SLOWEST = 3000  # milliseconds, on a machine that others use as well; a hang is far above
QUICK = {
    "deadline": SLOWEST,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "auto", "<|im_end|>", "{{ 1 }}", "[[", "*", "model"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
# What to cut out, and what to put there: at a share of the file's length, because lengths differ.
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=8) | st.sampled_from([b"{", b'"', b"\n", b"\0", b"9" * 30])),
    min_size=1,
    max_size=4,
)  # fmt: skip


def damage(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Content with some bytes cut out and others put in."""
    for share, cut, put in edits:
        start = int(share * len(content))
        content = content[:start] + put + content[start + cut :]
    return content


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder; each example restores what it damages."""
    folder = tmp_path_factory.mktemp("fuzz") / "work"
    folder.mkdir()
    write_good_tree(folder)
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (run / "run.json").write_text('{"status": "finished", "strategy": "chat", "model_hash": null}', encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval_loss": 2.0}\n', encoding="utf-8")
    (folder / "adapter").rename(run / "adapter")
    return folder


def answer_or_refuse(folder: Path, read: Callable[[], Any]) -> None:
    """Reads; anything but a result or an error of ours is a failure, and so is a changed file."""
    before = hash_tree(folder)
    problems: tuple[Problem, ...] = ()
    try:
        read()
    except TunebookError as error:
        problems = error.problems
    assert all(problem.message for problem in problems)
    assert hash_tree(folder) == before


def with_content(path: Path, content: bytes, read: Callable[[], Any]) -> None:
    """Reads with other content in a file, which is put back."""
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        answer_or_refuse(path.parent, read)
    finally:
        path.write_bytes(good)


@settings(max_examples=80, **QUICK)
@given(edits=EDITS)
def test_a_damaged_recipe_is_read_or_refused(tree: Path, edits: list[tuple[float, int, bytes]]) -> None:
    path = tree / "recipe.yaml"
    with_content(path, damage(RECIPE.encode(), edits), lambda: load_recipe(path))


@settings(max_examples=30, **QUICK)
@given(text=st.text(max_size=200))
def test_any_text_as_a_recipe_is_read_or_refused(tree: Path, text: str) -> None:
    path = tree / "recipe.yaml"
    with_content(path, text.encode("utf-8", "surrogatepass"), lambda: load_recipe(path))


def list_recipe_keys() -> list[str]:
    """Dotted keys that a recipe has."""
    sections = json.loads((Path(__file__).parents[1] / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    kinds = sections["$defs"]
    return [
        f"{name}.{key}"
        for name in sections["properties"]
        for kind in kinds.values()
        if str(kind.get("title", "")).lower() == f"{name}section"
        for key in kind["properties"]
    ]


@settings(max_examples=100, **QUICK)
@given(key=st.sampled_from(list_recipe_keys()), value=JSON)
def test_any_value_of_any_key_is_taken_or_refused(tree: Path, key: str, value: Any) -> None:
    override = f"{key}={json.dumps(value)}"
    answer_or_refuse(tree, lambda: load_recipe(tree / "recipe.yaml", [override]))


def scan(path: Path) -> Any:
    """The first pass over a file's rows, as `validate.py` does it."""
    return scan_rows(DataSection(train=str(path), eval_fraction=0.25), 1, lambda key: f"recipe.yaml:{key}")


def make_files(folder: Path) -> dict[str, bytes]:
    """Good rows in each kind of file."""
    write_parquet(folder / "rows.parquet", {"prompt": ["a", "b"] * 4, "completion": ["c", "d"] * 4})
    rows = [{"prompt": "a", "completion": "b"}] * 8
    return {
        "rows.jsonl": make_rows(8).encode(),
        "rows.json": json.dumps(rows, indent=1).encode(),
        "rows.csv": b"prompt,completion\n" + b'a,"b, c"\n' * 8,
        "rows.parquet": (folder / "rows.parquet").read_bytes(),
    }


@settings(max_examples=100, **QUICK)
@given(name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"]), edits=EDITS)
def test_a_damaged_file_of_rows_is_read_or_refused(name: str, edits: list[tuple[float, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(damage(make_files(Path(folder))[name], edits))
        answer_or_refuse(Path(folder), lambda: scan(path))
        answer_or_refuse(Path(folder), lambda: read_prompts(path))


@settings(max_examples=80, **QUICK)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "text", "label", "tools", "instruction", "output"]
            ),
            JSON | st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), JSON), max_size=3),
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)  # fmt: skip
def test_rows_of_any_shape_are_read_or_refused(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", errors="surrogatepass")
        answer_or_refuse(Path(folder), lambda: scan(path))


@settings(max_examples=80, **QUICK)
@given(
    name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]), edits=EDITS
)
def test_a_damaged_model_folder_is_read_or_refused(
    tree: Path, name: str, edits: list[tuple[float, int, bytes]]
) -> None:
    path = tree / "model" / name
    with_content(path, damage(path.read_bytes(), edits), lambda: read_model_files(tree))


def read_model_files(tree: Path) -> None:
    """A model's folder and its tokenizer."""
    source = find_model(ModelSection(name=str(tree / "model")), "recipe.yaml:2", with_weights=True)
    refuse_oversized(source)
    load_tokenizer(source.folder)
    for path in source.list_weight_files():
        read_tensor_file(path)


CONFIG_KEYS = ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "architectures",
               "rope_scaling", "auto_map", "_x", "quantization_config", "tie_word_embeddings", "n_positions", "attn_pdrop"]  # fmt: skip
TOKENIZER_KEYS = ["eos_token", "pad_token", "chat_template", "added_tokens_decoder", "extra_special_tokens", "tokenizer_class",
                  "model_max_length", "auto_map", "fast_tokenizer_files", "init_inputs", "tokenizer_object", "gguf_file",
                  "backend", "clean_up_tokenization_spaces", "split_special_tokens", "padding_side"]  # fmt: skip


@settings(max_examples=100, **QUICK)
@given(
    where=st.sampled_from(
        [*(("config.json", key) for key in CONFIG_KEYS), *(("tokenizer_config.json", key) for key in TOKENIZER_KEYS)]
    ),
    value=JSON,
)
def test_any_value_in_a_models_configuration_is_taken_or_refused(
    tree: Path, where: tuple[str, str], value: Any
) -> None:
    path = tree / "model" / where[0]
    content = json.dumps({**json.loads(path.read_text(encoding="utf-8")), where[1]: value})
    with_content(path, content.encode(), lambda: read_model_files(tree))


ADAPTER_KEYS = ["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save",
                "trainable_token_indices", "target_parameters", "exclude_modules", "layers_pattern", "use_dora", "bias", "task_type",
                "megatron_config", "fan_in_fan_out", "layers_to_transform"]  # fmt: skip


@settings(max_examples=80, **QUICK)
@given(key=st.sampled_from(ADAPTER_KEYS), value=JSON)
@example(key="lora_alpha", value=10**400)  # no float holds it
def test_any_value_in_an_adapters_configuration_is_taken_or_refused(tree: Path, key: str, value: Any) -> None:
    source = find_model(ModelSection(name=str(tree / "model")), "recipe.yaml:2", with_weights=True)
    path = tree / "run" / "adapter" / "adapter_config.json"
    content = json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value})
    with_content(path, content.encode(), lambda: find_adapter(str(path.parent), source, "recipe.yaml:4"))
    with_content(path, content.encode(), lambda: read_peft_adapter(path.parent, source, "recipe.yaml:4"))


@settings(max_examples=80, **QUICK)
@given(name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), edits=EDITS)
def test_a_damaged_adapter_is_read_or_refused(tree: Path, name: str, edits: list[tuple[float, int, bytes]]) -> None:
    source = find_model(ModelSection(name=str(tree / "model")), "recipe.yaml:2", with_weights=True)
    path = tree / "run" / "adapter" / name
    with_content(
        path, damage(path.read_bytes(), edits), lambda: find_adapter(str(path.parent), source, "recipe.yaml:4")
    )


MLX_KEYS = ["fine_tune_type", "num_layers", "lora_parameters", "rank", "scale", "dropout", "keys"]


@settings(max_examples=80, **QUICK)
@given(key=st.sampled_from(MLX_KEYS), value=JSON)
def test_any_value_in_an_mlx_adapters_configuration_is_taken_or_refused(tree: Path, key: str, value: Any) -> None:
    source = find_model(ModelSection(name=str(tree / "model")), "recipe.yaml:2", with_weights=True)
    path = tree / "mlx_adapter" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (config if key in config else config["lora_parameters"])[key] = value
    with_content(path, json.dumps(config).encode(), lambda: read_mlx_adapter(path.parent, source, "recipe.yaml:4"))


@settings(max_examples=80, **QUICK)
@given(name=st.sampled_from(["adapter_config.json", "adapters.safetensors"]), edits=EDITS)
def test_a_damaged_mlx_adapter_is_read_or_refused(tree: Path, name: str, edits: list[tuple[float, int, bytes]]) -> None:
    source = find_model(ModelSection(name=str(tree / "model")), "recipe.yaml:2", with_weights=True)
    path = tree / "mlx_adapter" / name
    content = damage(path.read_bytes(), edits)
    with_content(path, content, lambda: read_mlx_adapter(path.parent, source, "recipe.yaml:4"))


@settings(max_examples=80, **QUICK)
@given(name=st.sampled_from(["recipe.yaml", "run.json", "metrics.jsonl"]), edits=EDITS)
def test_a_damaged_run_folder_is_read_or_refused(tree: Path, name: str, edits: list[tuple[float, int, bytes]]) -> None:
    def read() -> None:
        run: RunFolder = find_run(tree / "run")
        run.load_recipe()
        run.check_complete()
        run.check_base(find_model(ModelSection(name=str(tree / "model")), "r", with_weights=True))
        run.check_data({"train": "0", "eval": None})
        run.read_metrics()

    path = tree / "run" / name
    with_content(path, damage(path.read_bytes(), edits), read)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole checkpoint; the generators of the tests are put back at the end."""
    before = capture_generators()

    def write(folder: Path) -> None:
        save_file({"exp_avg:w": np.ones(4, dtype=np.float32)}, folder / OPTIMIZER, metadata={"numbers": "{}"})

    state = {"training": TrainingState(step=3).to_json(), "random": before, "lines": {}, "made_with": {}}
    yield save_checkpoint(tmp_path_factory.mktemp("run"), 3, write, state)
    restore_generators(before)


def read_back(folder: Path) -> Checkpoint | str:
    """What `--resume` does with a checkpoint before it looks at tensors."""
    found = read_checkpoint(folder, {})
    if isinstance(found, Checkpoint):
        restore_generators(found.state.get("random"))
    return found


@settings(max_examples=120, **QUICK)
@given(name=st.sampled_from([STATE, OPTIMIZER, MANIFEST]), edits=EDITS, sealed=st.booleans())
def test_a_damaged_checkpoint_is_read_or_called_broken(
    checkpoint: Path, name: str, edits: list[tuple[float, int, bytes]], sealed: bool
) -> None:
    manifest = (checkpoint / MANIFEST).read_bytes()
    path = checkpoint / name
    good = path.read_bytes()
    path.write_bytes(damage(good, edits))
    if sealed and name != MANIFEST:  # by somebody who knows how
        write_manifest(checkpoint)
    try:
        answer_or_refuse(checkpoint, lambda: read_back(checkpoint))
        if not sealed and path.read_bytes() != good and name != MANIFEST:
            assert isinstance(read_back(checkpoint), str)
    finally:
        path.write_bytes(good)
        (checkpoint / MANIFEST).write_bytes(manifest)
    assert isinstance(read_back(checkpoint), Checkpoint)


@settings(max_examples=120, **QUICK)
@given(
    place=st.sampled_from([("training",), ("random",), ("made_with",), ("lines",)])
    | st.tuples(st.just("training"), st.sampled_from(sorted(TrainingState().to_json())))
    | st.tuples(st.just("random"), st.sampled_from(["python", "numpy"]))
    | st.tuples(st.just("random"), st.sampled_from(["python", "numpy"]), st.integers(0, 1)),
    value=JSON,
)
@example(place=("random", "numpy", 1), value=2**70)
def test_any_value_in_the_state_of_a_checkpoint_is_taken_or_called_broken(
    checkpoint: Path, place: tuple[Any, ...], value: Any
) -> None:
    path, manifest = checkpoint / STATE, (checkpoint / MANIFEST).read_bytes()
    good = path.read_bytes()
    state = json.loads(good)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(state), encoding="utf-8")
    write_manifest(checkpoint)
    try:
        answer_or_refuse(checkpoint, lambda: read_back(checkpoint))
    finally:
        path.write_bytes(good)
        (checkpoint / MANIFEST).write_bytes(manifest)


def test_the_fuzzing_itself_sees_a_reader_that_breaks_or_writes(tree: Path) -> None:
    def break_down() -> None:
        raise KeyError("not ours")

    with pytest.raises(KeyError):
        answer_or_refuse(tree, break_down)
    with pytest.raises(AssertionError):
        answer_or_refuse(tree, lambda: (tree / "left.txt").write_text("x"))
    (tree / "left.txt").unlink()
    answer_or_refuse(tree, lambda: load_recipe(tree / "recipe.yaml"))
    with pytest.raises(RecipeError):
        load_recipe(tree / "nowhere.yaml")
    with pytest.raises(DataError):
        scan(tree / "nowhere.jsonl")
