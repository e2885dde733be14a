"""A small good working folder, and the changes that make each of its copies bad.

The folder holds a model of 4,000 parameters in real files, rows, a recipe, an adapter and, once `case_server.py` has trained one, a run.
A case is the copy with one thing changed; everything in it is relative, so that messages are the same on every machine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, INNER = 16, 2, 2, 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
RECIPE = """\
model:
  name: ./model
  dtype: float32
data:
  train: rows.jsonl
  eval_fraction: 0.25
lora:
  r: 2
training:
  method: sft
  max_steps: 2
  batch_size: 4
"""


def make_rows(count: int = 12) -> str:
    """Good conversations as JSON lines."""
    turns = [
        [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(count)
    ]
    return "".join(json.dumps({"messages": one}) + "\n" for one in turns)


def list_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{here}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{here}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{here}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (HIDDEN,)}


def write_model(folder: Path) -> None:
    """config.json, tokenizer, template and random weights, without a framework."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", tokens)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    write_json(folder / "config.json", config)
    numbers = np.random.default_rng(0)
    tensors = {
        name: (np.ones(shape) if len(shape) == 1 else 0.02 * numbers.standard_normal(shape)).astype(np.float32)
        for name, shape in list_shapes(len(vocabulary)).items()
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_adapter(folder: Path) -> None:
    """A LoRA adapter of rank 2 on the query projections, as peft writes it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "./model",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_" for layer in range(LAYERS)]
    tensors = {f"{name}A.weight": np.full((2, HIDDEN), 0.01, np.float32) for name in names}
    tensors |= {f"{name}B.weight": np.full((HIDDEN, 2), 0.01, np.float32) for name in names}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def write_mlx_adapter(folder: Path) -> None:
    """The same adapter as mlx-lm writes it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    write_json(
        folder / "adapter_config.json", {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": parameters}
    )
    names = [f"model.layers.{layer}.self_attn.q_proj.lora_" for layer in range(LAYERS)]
    tensors = {f"{name}a": np.full((HIDDEN, 2), 0.01, np.float32) for name in names}
    tensors |= {f"{name}b": np.full((2, HIDDEN), 0.01, np.float32) for name in names}
    save_file(tensors, str(folder / "adapters.safetensors"))


def write_good_tree(tree: Path) -> None:
    """The good folder, without a run."""
    write_model(tree / "model")
    write_adapter(tree / "adapter")
    write_mlx_adapter(tree / "mlx_adapter")
    (tree / "rows.jsonl").write_text(make_rows(), encoding="utf-8")
    (tree / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def set_keys(path: Path, values: dict[str, Any]) -> None:
    """Sets keys of a JSON file; dots lead into objects."""
    document = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        *parents, last = key.split(".")
        inner = document
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    write_json(path, document)


def drop_keys(path: Path, keys: list[str]) -> None:
    """Removes keys of a JSON file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in document.items() if key not in keys})


def flip_byte(path: Path, offset: int) -> None:
    """Changes one byte; a negative offset counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def replace_header(path: Path, changes: dict[str, Any]) -> None:
    """Changes entries of a safetensors header and leaves the bytes behind it; null removes an entry."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, change in changes.items():
        if change is None:
            del header[name]
        else:
            header[name] = {**header.get(name, {}), **change}
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])


def fill_tensors(path: Path, values: dict[str, float]) -> None:
    """Fills tensors of a safetensors file with one number."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    for name, value in values.items():
        tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, path, metadata={"format": "pt"})


def write_pickle(path: Path) -> None:
    """A pickle that writes a file called `canary` where it is read: the form of a .bin or .pt file."""
    path.write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")


def write_code(path: Path) -> None:
    """A Python file that writes `canary` when it is imported."""
    path.write_text("open('canary', 'w').write('run')\n", encoding="utf-8")


def write_gzip(path: Path, megabytes: int) -> None:
    """A gzipped JSON array of spaces: small on disk, large once unpacked."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b"[")
        for _ in range(megabytes):
            file.write(b" " * (1 << 20))
        file.write(b"]")


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """A Parquet file."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def replace_text(path: Path, texts: list[str]) -> None:
    """Puts the second text in the place of the first, which must be there."""
    old, new = texts
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new), encoding="utf-8")


def repeat(path: Path, parts: list[Any]) -> None:
    """Writes texts, each of them alone or as `[text, times]`: for what is too long to stand in a list of cases."""
    pieces = (part if isinstance(part, str) else part[0] * part[1] for part in parts)
    path.write_text("".join(pieces), encoding="utf-8")


def nest_header(path: Path, depth: int) -> None:
    """A safetensors file whose header is nothing but nested lists."""
    header = b'{"a": ' + b"[" * depth
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def append(path: Path, text: str) -> None:
    """Adds text at the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def link(path: Path, target: str) -> None:
    """Puts a symbolic link in the place of a file."""
    if path.is_dir():
        path.rename(path.with_name(f"{path.name}.moved"))
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# What a case may do to its copy of the folder: verb → function of a path and what stands behind it.
VERBS: dict[str, Callable[[Path, Any], None]] = {
    "write": lambda path, text: path.write_text(text, encoding="utf-8"),
    "hex": lambda path, text: path.write_bytes(bytes.fromhex(text)),
    "utf16": lambda path, text: path.write_bytes(text.encode("utf-16")),
    "latin1": lambda path, text: path.write_bytes(text.encode("latin-1")),
    "append": append,
    "replace": replace_text,
    "repeat": repeat,
    "json": set_keys,
    "drop": drop_keys,
    "remove": lambda path, _: path.unlink(),
    "link": link,
    "truncate": lambda path, size: os.truncate(path, size),
    "flip": flip_byte,
    "header": replace_header,
    "nest": nest_header,
    "fill": fill_tensors,
    "pickle": lambda path, _: write_pickle(path),
    "code": lambda path, _: write_code(path),
    "gzip": write_gzip,
    "parquet": write_parquet,
    "pipe": lambda path, _: os.mkfifo(path),
}


def change_tree(tree: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Applies the changes of a case: `{verb: {file: value}}`, in the order in which they stand."""
    for verb, files in changes.items():
        for name, value in files.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            VERBS[verb](path, value)


def hash_tree(tree: Path) -> dict[str, str]:
    """Name → what it is, of everything below a folder: kind, size, link target and content."""
    found = {}
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found
