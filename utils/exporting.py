"""An adapter in the format of another tool, written whole or not at all, and what one should know before using it there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.adapter_formats import CHAT_TEMPLATE, convert_to_mlx, convert_to_peft, is_mlx_adapter
from utils.adapter_source import find_adapter, locate_adapter
from utils.atomic_files import write_folder_atomically
from utils.exceptions import RunError
from utils.file_lines import read_utf8
from utils.model_headers import read_json_object
from utils.model_safety import MAX_TOKENIZER_CONFIG
from utils.model_source import ModelSource
from utils.plain_adapters import PlainAdapter

Format = Literal["mlx", "peft"]
FORMAT_NAMES: dict[Format, str] = {"mlx": "mlx-lm", "peft": "PEFT"}
# mlx-lm 0.32.2 reads these where transformers 5 no longer writes them: at the top of config.json.
MOVED_SETTINGS = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: the new adapter.
        notes: what is different where the adapter goes; empty in most cases.
        commands: that use it.
    """

    folder: Path
    adapter: PlainAdapter
    notes: tuple[str, ...]
    commands: tuple[str, ...]

    def describe(self, to: Format) -> list[str]:
        """The result in lines."""
        kind = "DoRA" if self.adapter.is_dora else "LoRA"
        what = f"{kind} on {len(self.adapter.modules)} modules, rank {self.adapter.rank}, scale {self.adapter.scale:g}"
        lines = [f"Adapter in the format of {FORMAT_NAMES[to]}: {self.folder} ({what})"]
        lines += [f"Note: {note}" for note in self.notes]
        first, *others = self.commands
        return [*lines, f"Next: {first}", *(f"      {command}" for command in others)]


def export_adapter(name: str, source: ModelSource, to: Format, out: Path | None, where: str) -> Export:
    """Writes an adapter in the other format.

    Args:
        name: its folder, or a run folder.
        source: its base, with weights.
        out: folder to create; None for one beside the adapter.
        where: what named the adapter, for errors.

    Raises:
        RecipeError: there is no adapter.
        AdapterError: it does not fit its base, or the other format cannot hold it.
        RunError: it is in this format already, or the folder exists or cannot be written.
    """
    given = locate_adapter(name, where)
    if is_mlx_adapter(given) == (to == "mlx"):
        message = f"the adapter is in the format of {FORMAT_NAMES[to]} already"
        raise RunError(message, where=where, fix=f"use {given} as it is", code="same-format")
    find_adapter(name, source, where)
    beside = given.resolve() if given.name in ("", "..") else given
    folder = out or beside.with_name(f"{beside.name}_{to}")
    if folder.exists():
        raise RunError("the folder exists already", where=str(folder), fix="name another one with --out", code="exists")
    found: list[PlainAdapter] = []

    def write(temporary: Path) -> None:
        if to == "mlx":
            found.append(convert_to_mlx(given, source, temporary, where))
        else:
            found.append(convert_to_peft(given, source, temporary, where, source.public_name))

    write_folder_atomically(folder, write)
    model = source.name
    commands = [["python", "scripts/infer.py", "--model", model, "--adapter", str(folder)]]
    if to == "mlx":
        model = source.public_name
        commands.insert(0, ["mlx_lm.generate", "--model", model, "--adapter-path", str(folder), "--prompt", "…"])
    notes = tuple(list_mlx_notes(source, given)) if to == "mlx" else ()
    return Export(folder, found[0], notes, tuple(shlex.join(command) for command in commands))


def list_mlx_notes(source: ModelSource, adapter: Path) -> Iterator[str]:
    """What mlx-lm's own tools do otherwise than Tunebook, with this base and this adapter."""
    config = source.config
    rope: Any = config.get("rope_parameters") or {}
    moved = [key for key in MOVED_SETTINGS if isinstance(rope, dict) and key in rope and key not in config]
    if moved and source.model_type != "qwen3":
        values = ", ".join(f'"{key}": {rope[key]}' for key in moved)
        yield (
            f"mlx-lm 0.32.2 does not read rope_parameters, and computes another model than {source.folder}. "
            f"Give it a copy whose config.json says at the top: {values}"
        )
    if source.model_type == "gpt2" and "n_ctx" not in config:
        yield "mlx-lm 0.32.2 does not load GPT-2 as transformers 5 saves it; the folder on the hub loads"
    template = adapter / CHAT_TEMPLATE
    if template.is_file() and read_utf8(template).strip() != read_base_template(source.folder).strip():
        yield (
            "the adapter was trained with another chat template than the model's own, which mlx_lm.generate takes: "
            "render prompts yourself, and pass them with --ignore-chat-template"
        )


def read_base_template(folder: Path) -> str:
    """The chat template of a model folder, or nothing."""
    if (path := folder / CHAT_TEMPLATE).is_file():
        return read_utf8(path)
    path = folder / "tokenizer_config.json"
    template = read_json_object(path, str(path), MAX_TOKENIZER_CONFIG).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else ""
