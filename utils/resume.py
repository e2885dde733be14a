"""A run that was killed or stopped goes on: is it one that can, is everything as it was, and from which checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config.recipe_io import LoadedRecipe
from utils.atomic_files import remove_unfinished
from utils.checkpoint import Checkpoint, find_checkpoint
from utils.exceptions import RunError
from utils.logging import get_logger
from utils.run_folder import RunFolder
from utils.run_identity import SAME, check_inputs_are_same, check_recipe_is_same, check_rows_are_same, identify_inputs

if TYPE_CHECKING:
    from utils.preflight import Preflight

# Facts that `--resume` reads, with the type that each must have.
NEEDED = {
    "settings": dict,
    "automatic": list,
    "recipe_hash": str,
    "recipe": str,
    "sources": dict,
    "tokenizer_hash": str,
    "template_hash": str,
    "template_source": str,
    "versions": dict,
    "backend": str,
    "dtype": str,
    "threads": int,
    "resumes": int,
}


@dataclass(frozen=True)
class Resumption:
    """A run that is to go on; its lock is held.

    Attributes:
        loaded: the recipe that it began with.
        facts: its run.json.
    """

    folder: RunFolder
    loaded: LoadedRecipe
    facts: dict[str, Any]

    def check_rows(self) -> None:
        """Refuses rows that have changed, before they are looked at.

        Raises:
            RunError: naming the files.
        """
        from utils.prepared_data import describe_sources

        places = {part: self.loaded.find_origin(f"data.{part}") for part in ("train", "eval")}
        check_rows_are_same(self.facts, describe_sources(self.loaded), places)

    def find_checkpoint(self, preflight: Preflight) -> Checkpoint | None:
        """The checkpoint to go on from, once nothing else can be wrong; what killed processes left is removed.

        Returns:
            None where the run was ended before its first checkpoint: it begins anew, with the same result.

        Raises:
            RunError: template, tokenizer or base have changed, or no checkpoint is whole.
        """
        check_inputs_are_same(self.facts, identify_inputs(preflight), self.loaded.find_origin("data.template"))
        self.folder.check_base(preflight.source)
        for folder in (self.folder.path, self.folder.path / "checkpoints"):
            remove_unfinished(folder)
        found = find_checkpoint(self.folder.path, {key: self.facts.get(key) for key in SAME})
        if found is None:
            get_logger().info("This run has no checkpoint yet, and starts from its first step")
        return found


def open_resumption(folder: RunFolder, asked: LoadedRecipe | None, *, trusts_code: bool = False) -> Resumption:
    """Checks what can be known of a run without reading its rows.

    Args:
        asked: the recipe that the user names beside the run, which must be the run's own.
        trusts_code: as in `RunFolder.load_recipe`.

    Raises:
        RunError: it is finished, was made by another engine or version, or its recipe is another one.
    """
    facts, where = folder.read_facts(), str(folder.path)
    if facts.get("status") == "finished":
        fix = f"look at it: python scripts/evaluate_run.py --run {folder.path}; or train anew with --recipe"
        raise RunError("this run is finished", where=where, fix=fix, code="finished")
    if facts.get("engine") == "trl":
        message = "this run was trained by TRL's trainer, whose state is in no checkpoint"
        raise RunError(message, where=where, fix="train again, or with training.engine: tunebook", code="engine")
    if not all(isinstance(facts.get(key), kind) for key, kind in NEEDED.items()) or not are_sources(facts["sources"]):
        message = "run.json lacks what this version needs to go on: the run is of an older one, or the file is damaged"
        raise RunError(message, where=str(folder.run_file), fix="train again", code="old-run")
    loaded = folder.load_recipe(trusts_code=trusts_code)
    check_recipe_is_same(facts, loaded, "put it back: a run goes on with the recipe that it began with")
    if asked is not None:
        check_recipe_is_same(facts, asked, "leave --recipe and --set out, or train anew without --resume")
    if loaded.recipe.model.dtype == "auto":  # which is quicker is timed, and decides the rounding
        loaded = loaded.with_automatic_value("model.dtype", facts["dtype"], "as when the run began")
    if loaded.recipe.backend == "auto":  # what is installed may have changed since, and with it the choice
        loaded = loaded.with_automatic_value("backend", facts["backend"], "as when the run began")
    return Resumption(folder, loaded, facts)


def are_sources(found: dict[str, Any]) -> bool:
    """True for `train` and `eval`, each with name and hash of its sources; `eval` may have none."""
    parts = [found.get("train"), found.get("eval") or []]
    pairs = [pair for part in parts if isinstance(part, list) for pair in part]
    is_list = all(isinstance(part, list) for part in parts)
    return is_list and all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs)
