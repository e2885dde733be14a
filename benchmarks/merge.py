"""How fast a merge from file to file is beside `cp` of the same files, and in how much memory, beside peft's own merge.

    python benchmarks/merge.py [--layers 30] [--rounds 3] [--folder DIR] [--skip-peft] [--write]

Writes a random bfloat16 Llama of about 2 billion parameters (4 GB in three files, seeded) with an adapter of rank 16 on all
linear layers into a temporary folder. Each work is a fresh process, timed without its imports, with the base's files out of
the page cache and nothing waiting to be written; the works take turns. `--write` writes docs/results/merge.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.model_headers import INDEX_NAME  # noqa: E402
from utils.tensor_files import Shape, encode, format_header  # noqa: E402

RESULT = ROOT / "docs" / "results" / "merge.md"
LIMIT = 1_500_000_000  # bytes above what the imports hold
FILES, RANK = 3, 16
HIDDEN, INNER, SMALL, VOCABULARY = 2048, 8192, 512, 128_256
LINEAR: dict[str, tuple[int, int]] = {  # outputs, inputs
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (SMALL, HIDDEN),
    "self_attn.v_proj": (SMALL, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
# Every work reads sys.argv: base, adapter, target. What stands before `work` is imported before the clock starts.
OURS = """
from utils.merge_checks import check_merge
from utils.merge_plan import plan_merge
from utils.model_source import ModelSource
from utils.streaming_merge import write_plan
from utils.atomic_files import write_folder_atomically
base, adapter, target = map(Path, sys.argv[1:4])
def merge(folder):
    plan = plan_merge(ModelSource(str(base), base, json.loads((base / "config.json").read_text())), [adapter], (), False)
    for _ in write_plan(plan, folder):
        pass
    check_merge(plan, folder)
"""
COPY = """
import shutil, subprocess
base, target = Path(sys.argv[1]), Path(sys.argv[3])
def copy(command):
    target.mkdir()
    subprocess.run([*command, *sorted(map(str, base.glob("model*"))), str(target)], check=True)
"""
PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.utils import logging
logging.disable_progress_bar()
base, adapter, target = sys.argv[1:4]
def work():
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
"""
FLUSH = """
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
"""
WORKS = {
    "cp": COPY + "def work():\n    copy(['cp'])\n",
    "ours": OURS + "def work():\n    target.mkdir()\n    merge(target)\n",
    "cp, flushed": COPY + "def work():\n    copy(['cp'])" + FLUSH,
    "ours, flushed": OURS + "def work():\n    write_folder_atomically(target, merge)\n",
}
MEASURE = """
import json, os, re, resource, sys, time
from pathlib import Path
{setup}
def read_memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = read_memory("VmRSS")
if {limit}:
    most = read_memory("VmData") + {limit}
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
start = time.perf_counter()
work()
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "peak": read_memory("VmHWM") - before}}))
"""


@dataclass(frozen=True)
class Outcome:
    """What one process did.

    Attributes:
        peak: bytes of resident memory above what its imports held.
        error: last line of a process that died, else "".
    """

    seconds: float = 0.0
    peak: int = 0
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the page, and writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="30 layers are 2.09 billion parameters (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="of every work that is timed (default: 3)")
    parser.add_argument("--folder", type=Path, help="where the models are written (default: a temporary folder)")
    parser.add_argument("--skip-peft", action="store_true", help="leave peft out")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        size = build_model(folder / "base", options.layers)
        build_adapter(folder / "adapter", options.layers)
        lines = list(measure_all(folder, size, options))
    print("\n".join(lines))
    if options.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\nWrote {RESULT}")
    return 0


def list_tensors(layers: int) -> list[tuple[str, Shape]]:
    """Names and shapes of a Llama whose head is its embedding."""
    found: list[tuple[str, Shape]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        found += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in LINEAR.items()]
        norms = ("input_layernorm", "post_attention_layernorm")
        found += [(f"model.layers.{layer}.{name}.weight", (HIDDEN,)) for name in norms]
    return [*found, ("model.norm.weight", (HIDDEN,))]


def build_model(folder: Path, layers: int) -> int:
    """Writes random weights; returns the bytes of their files."""
    folder.mkdir()
    tensors, generator = list_tensors(layers), np.random.default_rng(0)
    numbers = (generator.standard_normal(1 << 25) * 0.02).astype(np.float32)
    pool = np.empty(2 * len(numbers), np.uint8)
    encode(numbers, "BF16", pool, np.empty_like(numbers))
    parts, index, total = -(-len(tensors) // FILES), {}, 0
    for number in range(FILES):
        name = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        part = tensors[number * parts : (number + 1) * parts]
        with (folder / name).open("wb") as file:
            file.write(format_header([(key, "BF16", shape) for key, shape in part], {"format": "pt"}))
            for key, shape in part:
                left = 2 * int(np.prod(shape))
                while left:
                    begin = 2 * int(generator.integers(0, len(pool) // 4))
                    left -= file.write(pool[begin : begin + left].data)
                index[key] = name
            total += file.tell()
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def build_adapter(folder: Path, layers: int) -> None:
    """Writes a random adapter in peft's format."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    shapes: list[tuple[str, Shape]] = []
    for layer in range(layers):
        for name, (outputs, inputs) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes += [(f"{prefix}.lora_A.weight", (RANK, inputs)), (f"{prefix}.lora_B.weight", (outputs, RANK))]
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(format_header([(name, "F32", shape) for name, shape in shapes], {"format": "pt"}))
        for _, shape in shapes:
            file.write((generator.standard_normal(shape) * 0.02).astype(np.float32).tobytes())
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config["target_modules"] = [name.rpartition(".")[2] for name in LINEAR]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure_all(folder: Path, size: int, options: argparse.Namespace) -> list[str]:
    """Measures all works; returns the page."""
    found: dict[str, list[Outcome]] = {name: [] for name in WORKS}
    for _ in range(options.rounds):
        for name, setup in WORKS.items():
            found[name].append(measure(setup, folder))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    limited = f"under {LIMIT / 1e9:.1f} GB"
    found[f"ours, flushed, {limited}"] = [measure(WORKS["ours, flushed"], folder, LIMIT)]
    if not options.skip_peft:
        found[f"peft, {limited}"] = [measure(PEFT, folder, LIMIT)]
        found["peft"] = [measure(PEFT, folder)]
    table = ["| work | seconds | median | GB/s | beside `cp` | peak MB over imports |", "|---|---|---|---|---|---|"]
    for name, outcomes in found.items():
        if error := outcomes[0].error:
            table.append(f"| {name} | died: `{error}` | | | | |")
            continue
        times, peak = [one.seconds for one in outcomes], max(one.peak for one in outcomes)
        median = statistics.median(times)
        beside = median / statistics.median(one.seconds for one in found["cp, flushed" if "flushed" in name else "cp"])
        spread = ", ".join(f"{one:.1f}" for one in times)
        memory = "" if name.startswith("cp") else f"{peak / 1e6:.0f}"
        table.append(f"| {name} | {spread} | {median:.1f} | {size / median / 1e9:.2f} | {beside:.2f} | {memory} |")
    return describe(table, size, options)


def describe(table: list[str], size: int, options: argparse.Namespace) -> list[str]:
    """The page around the table."""
    parameters = sum(int(np.prod(shape)) for _, shape in list_tensors(options.layers))
    command = f"python benchmarks/merge.py --layers {options.layers} --rounds {options.rounds} --write"
    return [
        "# Merging: speed and memory of a merge from file to file",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: {describe_machine('numpy', 'peft', 'torch')}.",
        "",
        *table,
        "",
        f"A random bfloat16 Llama of {parameters / 1e9:.2f} billion parameters ({size / 1e9:.2f} GB in {FILES} files), and an",
        f"adapter of rank {RANK} on all linear layers. `cp` copies the weight files; ours reads them, folds the adapter in,",
        "writes the same files and reads rows of every tensor back. «Flushed» ends when the data is on the disk (fsync of each",
        "file), which is how `scripts/merge.py` ends; without it, part of the data is still in the page cache. Before each",
        "process, the base's files are dropped from the page cache and everything written before is on the disk. The clock",
        "starts after the imports; peak is VmHWM less the memory at that moment. A limit is RLIMIT_DATA,",
        f"{LIMIT / 1e9:.1f} GB above what the imports hold. peft loads the model in its own number format, and does not",
        "flush or look at what it wrote.",
    ]


def measure(setup: str, folder: Path, limit: int = 0) -> Outcome:
    """Runs a work in a fresh process, and removes what it wrote.

    Args:
        limit: bytes of memory above the imports, or 0.
    """
    target = folder / "merged"
    os.sync()
    for path in (folder / "base").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    code = MEASURE.format(setup=setup, limit=limit)
    command = [sys.executable, "-c", code, str(folder / "base"), str(folder / "adapter"), str(target)]
    environment = (
        {**os.environ, "OPENBLAS_NUM_THREADS": "1"} if setup.startswith(OURS) else None
    )  # as in scripts/merge.py
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(target, ignore_errors=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Outcome(error=lines[-1].replace(str(folder), "…"))
    result = json.loads(done.stdout.splitlines()[-1])
    return Outcome(result["seconds"], result["peak"])


def describe_machine(*packages: str) -> str:
    """Processor, cores, Python, and the versions of the packages that a result depends on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([cpu, f"{os.cpu_count()} cores", f"Python {platform.python_version()}", *versions])


if __name__ == "__main__":
    sys.exit(main())
