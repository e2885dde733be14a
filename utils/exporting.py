"""An adapter in the format of another tool, written whole or not at all, and what one should know before using it there."""

from __future__ import annotations

import json
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
from utils.mlx_support import translate_config
from utils.model_headers import read_json_object
from utils.model_safety import MAX_TOKENIZER_CONFIG
from utils.model_source import ModelSource, iterate_tensor_shapes
from utils.plain_adapters import PlainAdapter

Format = Literal["mlx", "peft"]
FORMAT_NAMES: dict[Format, str] = {"mlx": "mlx-lm", "peft": "PEFT"}


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
    if missing := find_unread_settings(source):
        yield (
            "mlx-lm's own tools skip parts of a config.json that transformers 5 has written, and may compute another model: "
            f"give them a copy of {source.folder} whose config.json also says {json.dumps(missing)[1:-1]}"
        )
    names = (name for name, _ in iterate_tensor_shapes(source))
    if source.model_type == "gpt2" and any(name.startswith("transformer.") for name in names):
        yield "mlx-lm's own tools do not load GPT-2 as transformers 5 saves it; the one on the hub loads"
    template = adapter / CHAT_TEMPLATE
    if template.is_file() and read_utf8(template).strip() != read_base_template(source.folder).strip():
        yield (
            "the adapter was trained with another chat template than the model's own, which mlx_lm.generate takes: "
            "render prompts yourself, and pass them with --ignore-chat-template"
        )


def find_unread_settings(source: ModelSource) -> dict[str, Any]:
    """What config.json says in a place where mlx-lm's own loader does not look, under the names that it looks for."""
    config, wanted = source.config, translate_config(source.config)
    # Qwen 3's is the one model in mlx-lm that reads both layouts.
    known = ("rope_theta", "rope_scaling") if source.model_type == "qwen3" else ()
    changed = {key: value for key, value in wanted.items() if value is not None and config.get(key) != value}
    return {key: value for key, value in changed.items() if key not in known}


def read_base_template(folder: Path) -> str:
    """The chat template of a model folder, or nothing."""
    if (path := folder / CHAT_TEMPLATE).is_file():
        return read_utf8(path)
    path = folder / "tokenizer_config.json"
    template = read_json_object(path, str(path), MAX_TOKENIZER_CONFIG).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else ""
