"""Merging from file to file gives what peft's own merge gives, to the last bit that rounding allows, and refuses all else."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.conftest import ROOT
from utils.adapter_changes import NeedsFramework
from utils.atomic_files import write_folder_atomically
from utils.exceptions import AdapterError, ModelLoadingError, RunError
from utils.merge_checks import check_merge
from utils.merge_plan import MergePlan, plan_copy, plan_merge
from utils.model_source import ModelSource
from utils.streaming_merge import write_plan
from utils.tensor_files import decode, encode, format_header, is_finite, read_tensor_file

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS: dict[str, PretrainedConfig] = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES),
    "phi": PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_oss": GptOssConfig(**EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=16),
}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes small random models, each once: `folders("tied", "BF16", shards=True)`."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(name: str, dtype: str = "BF16", *, shards: bool = False) -> Path:
        if (name, dtype, shards) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(DTYPES[dtype])
            model.save_pretrained(str(folder), max_shard_size="20KB" if shards else "1GB")
            made[name, dtype, shards] = folder
        return made[name, dtype, shards]

    return make


def open_source(folder: Path, adapter: Path | None = None) -> ModelSource:
    """A folder as a source."""
    return ModelSource(str(folder), folder, json.loads((folder / "config.json").read_text(encoding="utf-8")), adapter)


def save_adapter(folder: Path, target: Path, **settings: Any) -> Path:
    """An adapter of peft's with random numbers in every tensor, as after training."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network = get_peft_model(base, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **settings}))
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(str(target), save_embedding_layers=False)
    return target


def merge_files(source: ModelSource, adapters: list[Path], target: Path) -> dict[str, torch.Tensor]:
    """Plans, writes and checks a merge as `merge_run` does; returns the written tensors."""
    plan = plan_merge(source, adapters, (), False)
    write_folder_atomically(target, lambda temporary: write_and_check(plan, temporary))
    return {name: tensor for file in plan.files for name, tensor in load_file(target / file.name).items()}


def write_and_check(plan: MergePlan, folder: Path) -> None:
    """All bytes are told, and the check finds nothing."""
    assert sum(write_plan(plan, folder)) == sum(tensor.size for tensor in plan.tensors)
    check = check_merge(plan, folder)
    assert check.changed == sum(not tensor.is_copy for tensor in plan.tensors)


def merge_with_peft(folder: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    """Weights as peft merges them in float32."""
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for adapter in adapters:
        network = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload(safe_merge=True)
    return dict(network.state_dict())


def check_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], dtype: str) -> None:
    """Equal after rounding, unless float32 arithmetic cannot tell on which side of the middle a number lies."""
    if "h.0.attn.c_attn.weight" in ours:  # without the outermost module
        theirs = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    assert {*theirs} - {*ours} <= {"lm_head.weight"}
    for name, tensor in ours.items():
        exact = theirs[name]
        assert tensor.dtype == DTYPES[dtype], name
        assert tensor.shape == exact.shape, name
        if dtype == "F32":
            torch.testing.assert_close(tensor, exact, rtol=1e-6, atol=1e-6)
            continue
        rounded = exact.to(tensor.dtype)
        differ = tensor != rounded
        middle = (tensor.double() + rounded.double())[differ] / 2
        assert ((middle - exact.double()[differ]).abs() <= 1e-6 * (1 + exact.double()[differ].abs())).all(), name
        assert differ.float().mean() < 0.01, name


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"o_proj|c_proj|dense": 2}, "alpha_pattern": {r".*\.0\..*proj": 3}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tied", "untied", "qwen2", "phi", "gpt2"])
def test_every_variant_on_every_family_merges_as_peft_does(
    folders: Callable[..., Path], tmp_path: Path, name: str, variant: str
) -> None:
    folder = folders(name, shards=name in ("untied", "gpt2"))
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules="all-linear", **VARIANTS[variant])
    ours = merge_files(open_source(folder), [adapter], tmp_path / "merged")
    check_equal(ours, merge_with_peft(folder, [adapter]), "BF16")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert (
        sum(not torch.equal(ours[key].float(), base[key]) for key in ours) >= 8
    )  # a merge that does nothing would pass above


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("name", ["untied", "gpt2"])
def test_the_other_number_formats_merge_as_peft_does(
    folders: Callable[..., Path], tmp_path: Path, name: str, dtype: str
) -> None:
    folder = folders(name, dtype)
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules="all-linear", use_dora=True)
    ours = merge_files(open_source(folder), [adapter], tmp_path / "merged")
    check_equal(ours, merge_with_peft(folder, [adapter]), dtype)


@pytest.mark.parametrize("name", ["untied", "gpt2"])
def test_two_adapters_in_a_row_merge_one_after_the_other(
    folders: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    # DoRA's lengths are those of the base with the first adapter in it.
    folder = folders(name)
    first = save_adapter(folder, tmp_path / "first", target_modules="all-linear", use_dora=True)
    second = save_adapter(folder, tmp_path / "second", target_modules="all-linear", r=3, use_dora=True)
    ours = merge_files(open_source(folder, first), [first, second], tmp_path / "merged")
    check_equal(ours, merge_with_peft(folder, [first, second]), "BF16")


def test_modules_that_were_trained_whole_replace_those_of_the_base(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folders("untied")
    adapter = save_adapter(folder, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    ours = merge_files(open_source(folder), [adapter], tmp_path / "merged")
    check_equal(ours, merge_with_peft(folder, [adapter]), "BF16")
    assert not torch.equal(ours["lm_head.weight"], load_file(folder / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_is_merged_once_and_two_different_copies_of_it_are_refused(
    folders: Callable[..., Path], tmp_path: Path, same: bool
) -> None:
    folder = folders("tied")
    names = ["lm_head", "model.embed_tokens"]
    settings = {"target_modules": ["q_proj"], "modules_to_save": [*names], "ensure_weight_tying": True}
    adapter = save_adapter(folder, tmp_path / "a", **settings)
    tensors = load_file(adapter / "adapter_model.safetensors")
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    tensors["base_model.model.lm_head.weight"] = embedding.clone() if same else embedding + 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": names}))
    if not same:
        with pytest.raises(AdapterError, match=r"lm_head\.weight shares its matrix with the embedding"):
            plan_merge(open_source(folder), [adapter], (), False)
        return
    ours = merge_files(open_source(folder), [adapter], tmp_path / "merged")
    assert torch.equal(ours["model.embed_tokens.weight"], embedding.to(torch.bfloat16))
    assert "lm_head.weight" not in ours


def test_files_may_leave_out_the_outermost_module(folders: Callable[..., Path], tmp_path: Path) -> None:
    # GPT-2 on the hub says `h.0…`, and the module is called transformer.h.0….
    folder, short = folders("gpt2"), tmp_path / "short"
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules="all-linear")
    shutil.copytree(folder, short)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): one for name, one in tensors.items()}, short / "model.safetensors")
    ours = merge_files(open_source(short), [adapter], tmp_path / "merged")
    assert "h.0.attn.c_attn.weight" in ours
    check_equal(ours, merge_with_peft(folder, [adapter]), "BF16")


def test_adapters_on_experts_that_lie_in_one_tensor_merge_as_peft_does(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folders("gpt_oss", "F32")
    names = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]
    adapter = save_adapter(folder, tmp_path / "a", target_modules=["q_proj"], target_parameters=names[:1] + names[2:])
    ours = merge_files(open_source(folder), [adapter], tmp_path / "merged")
    check_equal(ours, merge_with_peft(folder, [adapter]), "F32")


def test_what_only_transformers_can_put_together_is_told_before_anything_is_written(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    experts, tied = folders("qwen3_moe", "F32"), folders("tied")
    on_experts = save_adapter(
        experts, tmp_path / "a", target_parameters=["experts.gate_up_proj"], target_modules=["q_proj"]
    )
    on_head = save_adapter(tied, tmp_path / "b", target_modules=["lm_head"])
    on_embedding = save_adapter(tied, tmp_path / "c", target_modules=["embed_tokens"])
    strange = save_adapter(tied, tmp_path / "d", target_modules=["q_proj"])
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}))
    cases = ((experts, on_experts, "experts"), (tied, on_head, "shares"), (tied, on_embedding, "embedding"))
    for folder, adapter, reason in (*cases, (tied, strange, "use_qalora")):
        with pytest.raises(NeedsFramework, match=reason):
            plan_merge(open_source(folder), [adapter], (), False)


def test_untouched_tensors_metadata_and_index_stay_as_they_are(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = folders("untied", shards=True)
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    merge_files(open_source(folder), [adapter], tmp_path / "merged")
    changed = 0
    for path in sorted(folder.glob("*.safetensors")):
        before, after = read_tensor_file(path), read_tensor_file(tmp_path / "merged" / path.name)
        assert path.read_bytes()[: before.data] == after.path.read_bytes()[: after.data]
        for one, other in zip(before.tensors, after.tensors, strict=True):
            same = path.read_bytes()[one.offset :][: one.size] == after.path.read_bytes()[other.offset :][: other.size]
            assert same == ("q_proj" not in one.name)
            changed += not same
    assert changed == 2
    index = "model.safetensors.index.json"
    assert json.loads((folder / index).read_text()) == json.loads((tmp_path / "merged" / index).read_text())


def test_a_copy_in_another_number_format_rounds_as_torch_does(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = folders("untied", "F32", shards=True)
    for name in ("bfloat16", "float16", "float32"):
        plan = plan_copy(folder, name)
        write_folder_atomically(tmp_path / name, lambda temporary, plan=plan: write_and_check(plan, temporary))
        for file in plan.files:
            theirs = load_file(folder / file.name)
            for key, tensor in load_file(tmp_path / name / file.name).items():
                assert torch.equal(tensor, theirs[key].to(getattr(torch, name)))


def test_bfloat16_is_rounded_bit_for_bit_as_torch_rounds_it() -> None:
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    edges = np.array(
        [0, 1, 0x8000, 0x18000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32
    )
    values = np.concatenate([edges, random]).view(np.float32)
    out = np.empty(2 * values.size, np.uint8)
    encode(values.copy(), "BF16", out, np.empty_like(values))
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    ours = torch.from_numpy(out.view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~theirs.isnan()], theirs[~theirs.isnan()])
    back = np.empty_like(values)
    decode(out, "BF16", back)
    np.testing.assert_array_equal(back, ours.float().numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_infinities_and_nans_are_seen_in_every_format(dtype: str) -> None:
    for value, finite in ((1.0, True), (-65000.0, True), (np.inf, False), (-np.inf, False), (np.nan, False)):
        values = np.array([0.5, -2.0, value], np.float32)
        raw = np.empty(values.size * (4 if dtype == "F32" else 2), np.uint8)
        encode(values, dtype, raw, np.empty_like(values))
        assert is_finite(raw, dtype) == finite


def change_adapter(good: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(good, target)
    tensors = load_file(good / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_a_key_too_many_too_few_or_of_another_shape_is_named(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = folders("untied")
    good = save_adapter(
        folder, tmp_path / "good", target_modules=["q_proj", "v_proj"], modules_to_save=["norm"], use_dora=True
    )
    layer = "base_model.model.model.layers.1.self_attn.q_proj"

    def remove_module(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(layer)]:
            del tensors[key]

    cases: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        r"no place for base_model\.model\.model\.layers\.9\.x": lambda t: t.update(
            {"base_model.model.model.layers.9.x": torch.ones(1)}
        ),
        r"no place for base_model\.model\.model\.layers\.9\.self_attn\.q_proj\.lora_A": lambda t: t.update(
            {
                f"{layer.replace('.1.', '.9.')}.lora_{one}.weight": torch.ones(s)
                for one, s in (("A", (4, 32)), ("B", (32, 4)))
            }
        ),
        r"no place for other": lambda t: t.update({"other": torch.ones(1)}),
        r"has no .*layers\.1\.self_attn\.q_proj\.lora_B": lambda t: t.pop(f"{layer}.lora_B.weight"),
        r"has no .*q_proj\.lora_magnitude_vector": lambda t: t.pop(f"{layer}.lora_magnitude_vector"),
        r"has no .*layers\.1\.self_attn\.q_proj\.lora_A": remove_module,
        r"has no base_model\.model\.model\.norm\.weight": lambda t: t.pop("base_model.model.model.norm.weight"),
        r"q_proj.* adapts 32 × 31": lambda t: t.update({f"{layer}.lora_A.weight": torch.ones(4, 31)}),
        r"lora_A\.weight is 3 × 32, and its place is 4 × 32": lambda t: t.update(
            {f"{layer}.lora_A.weight": torch.ones(3, 32)}
        ),
    }
    for number, (message, change) in enumerate(cases.items()):
        bad = change_adapter(good, tmp_path / f"bad{number}", change)
        with pytest.raises(AdapterError, match=message):
            plan_merge(open_source(folder), [bad], (), False)


def test_an_adapter_with_a_number_that_is_not_finite_is_refused_and_leaves_nothing(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folders("untied")
    good = save_adapter(folder, tmp_path / "good", target_modules=["q_proj"])
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    bad = change_adapter(good, tmp_path / "bad", lambda tensors: tensors[key][0, 0].fill_(torch.nan))
    with pytest.raises(
        AdapterError, match=r"layers\.1\.self_attn\.q_proj\.weight would hold numbers that are not finite"
    ):
        merge_files(open_source(folder), [bad], tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_the_check_sees_a_wrong_sum_a_wrong_copy_and_a_wrong_header(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folders("untied")
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    plan = plan_merge(open_source(folder), [adapter], (), False)
    (tmp_path / "merged").mkdir()
    list(write_plan(plan, tmp_path / "merged"))
    check_merge(plan, tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    good = path.read_bytes()
    places = {tensor.name: tensor.offset for tensor in read_tensor_file(path).tensors}
    for name, message in (
        ("model.layers.0.self_attn.q_proj.weight", "are not base"),
        ("model.norm.weight", "is not the base's"),
    ):
        bits = bytearray(good)
        bits[places[name]] ^= 2  # a step and a half of the last digit that bfloat16 has
        bits[places[name]] ^= 1
        path.write_bytes(bits)
        with pytest.raises(AdapterError, match=message):
            check_merge(plan, tmp_path / "merged")
    path.write_bytes(good.replace(b"model.norm.weight", b"model.morn.weight"))
    with pytest.raises(AdapterError, match="header"):
        check_merge(plan, tmp_path / "merged")


def write_header(path: Path, entries: dict[str, Any], data: int) -> None:
    """A safetensors file with this header and so many bytes behind it."""
    content = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(data))


def test_headers_that_claim_what_the_file_does_not_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(path, {"a": good}, 8)
    assert read_tensor_file(path).tensors[0].shape == (2,)
    for entries, data in (
        ({"a": good}, 7),
        ({"a": good}, 9),
        ({"a": {**good, "shape": [1 << 40]}}, 8),
        ({"a": {**good, "shape": [-2]}}, 8),
        ({"a": {**good, "shape": [True, 2]}}, 8),
        ({"a": {**good, "data_offsets": [8, 0]}}, 8),
        ({"a": {**good, "data_offsets": [0, 1 << 60], "shape": [1 << 58]}}, 8),
        ({"a": good, "b": good}, 8),
        ({"a": good, "b": {**good, "data_offsets": [12, 20]}}, 20),
        ({"a": [1]}, 8),
        ({"a": {"shape": [2]}}, 8),
        ({"__metadata__": 3, "a": good}, 8),
    ):
        write_header(path, entries, data)
        with pytest.raises(ModelLoadingError):
            read_tensor_file(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelLoadingError, match="too large"):
        read_tensor_file(path)
    twice = (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    )
    path.write_bytes(struct.pack("<Q", len(twice)) + twice)
    with pytest.raises(ModelLoadingError, match="twice"):
        read_tensor_file(path)


def test_a_written_header_is_read_by_safetensors(tmp_path: Path) -> None:
    header = format_header([("a", "F32", (2, 3)), ("b", "BF16", (5,))], {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(34))
    found = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"a": (2, 3), "b": (5,)}
    assert len(header) % 8 == 0


def test_a_file_that_ends_too_early_is_refused(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders("untied", shards=True), folder)
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelLoadingError, match="describes"):
        plan_merge(open_source(folder), [adapter], (), False)


def test_a_full_disk_is_an_error_that_leaves_nothing(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = folders("untied")
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            merge_files(open_source(folder), [adapter], tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.glob("*merged*"))


KILLED = """
import json, os, signal, sys
from pathlib import Path
from utils.atomic_files import write_folder_atomically
from utils.merge_plan import plan_merge
from utils.model_source import ModelSource
from utils.streaming_merge import write_plan
base, adapter, target = map(Path, sys.argv[1:])
plan = plan_merge(ModelSource("", base, json.loads((base / "config.json").read_text())), [adapter], (), False)
def write(folder):
    next(write_plan(plan, folder))
    os.kill(os.getpid(), signal.SIGKILL)
write_folder_atomically(target, write)
"""


def test_a_kill_in_the_middle_leaves_no_folder_and_the_merge_can_be_repeated(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folders("untied", shards=True)
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    command = [sys.executable, "-c", KILLED, str(folder), str(adapter), str(tmp_path / "merged")]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    ours = merge_files(open_source(folder), [adapter], tmp_path / "merged")
    check_equal(ours, merge_with_peft(folder, [adapter]), "BF16")
    assert os.listdir(tmp_path / "merged")
