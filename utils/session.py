"""A model ready to answer: from a run folder or from a model folder, with the template that it was trained with."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.recipe_io import LoadedRecipe
from config.structured_config import DataSection, GenerationSection, ModelSection, Recipe
from utils.adapter_formats import CHAT_TEMPLATE
from utils.adapter_source import read_adapter_config
from utils.backends import Backend, choose_backend, load_backend
from utils.batching import Ids, pad_prompts_left
from utils.evaluation import load_trained_model
from utils.exceptions import AdapterError, DataError, RecipeError
from utils.file_lines import read_utf8
from utils.inference import Responder, make_settings
from utils.logging import get_logger
from utils.messages import Message, check_message, check_text
from utils.model_shape import find_positions
from utils.model_source import EMBEDDED_PREFIX, ModelSource, find_model
from utils.run_folder import RunFolder
from utils.run_tokenizer import choose_loss_on, open_run_tokenizer
from utils.scoring import Judge
from utils.seed_manager import SeedManager
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_training import refuse_unknown_characters
from utils.tokenizer_utils import TokenizerUtils


@dataclass(frozen=True)
class Session:
    """A loaded model with its tokenizer and settings.

    Attributes:
        continues_text: the model was trained from scratch on text and knows no turns: each prompt stands alone.
    """

    responder: Responder
    continues_text: bool = False

    def encode(self, messages: Sequence[Message]) -> Ids:
        """Token ids of a conversation that ends with the user.

        Raises:
            DataError: the tokenizer does not know a character of it.
        """
        seen = messages[-1:] if self.continues_text else messages
        for message in seen:
            refuse_unknown_characters(self.responder.tokenizer.tokenizer, str(message["content"]))
        return self.responder.tokenizer.encode_prompt(seen)

    def answer(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Answers many conversations in batches."""
        return self.responder.answer([self.encode(messages) for messages in conversations], "Answers")

    def stream(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """Yields an answer piece by piece; a piece ends only where its characters are complete."""
        responder = self.responder
        batch = pad_prompts_left([self.encode(messages)], responder.settings.pad_id)
        ids: list[int] = []
        shown = ""
        for token in responder.backend.stream(responder.model, batch, responder.settings):
            ids.append(token)
            text = responder.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half of a multi-byte character: wait for the rest
                yield text[len(shown) :]
                shown = text


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with the tokenizer that belongs to it.

    Attributes:
        source: the files of the base, or of the whole model.
    """

    backend: Backend
    model: Any
    tokenizer: TokenizerUtils
    recipe: Recipe
    source: ModelSource

    def open_session(self) -> Session:
        """To ask it questions."""
        settings, size = make_settings(self.tokenizer, self.recipe.generation), self.recipe.evaluation.batch_size
        responder = Responder(self.backend, self.model, self.tokenizer, settings, size)
        return Session(responder, continues_text=self.recipe.scratch is not None)

    def open_judge(self) -> Judge:
        """To have it score answers."""
        positions = find_positions(self.source.config)
        return Judge(self.backend, self.model, self.tokenizer, self.recipe.evaluation.batch_size, positions)


def load_run(folder: RunFolder, loaded: LoadedRecipe) -> LoadedModel:
    """Loads the trained model of a run.

    Args:
        loaded: the run's recipe, possibly with generation settings overridden.
    """
    recipe = loaded.recipe
    folder.check_complete()
    is_whole = not folder.adapter.is_dir()  # all weights were trained: they need no base
    if is_whole:
        source = find_model(ModelSection(name=str(folder.model)), str(folder.path), with_weights=True)
    else:
        source = find_model(recipe.model, loaded.find_origin("model.name"), with_weights=True)
        folder.check_base(source)
    tokenizer = open_run_tokenizer(loaded, source, folder)
    backend = load_backend(choose_backend(recipe, source.config))
    SeedManager(recipe.seed).seed_everything()
    loaded_model = backend.load_model(source, recipe)
    model = loaded_model if is_whole else load_trained_model(backend, loaded_model, recipe, folder)
    return LoadedModel(backend, model, tokenizer, recipe, source)


def judges_answers(name: str) -> bool:
    """True for the name of a reward model; an embedded one is none, which is known before it is converted."""
    return (
        not name.startswith(EMBEDDED_PREFIX)
        and find_model(ModelSection(name=name), "--model", with_weights=False).is_reward
    )


def load_plain(name: str, generation: GenerationSection | None = None, adapter: str | None = None) -> LoadedModel:
    """Loads a model that is no run: a merged folder, a local model, a hub id or an embedded one.

    Args:
        adapter: folder of an adapter that is folded in, in the format of PEFT or of mlx-lm.

    Raises:
        RecipeError: settings of generation for a reward model.
        AdapterError: the adapter does not fit.
    """
    recipe, source, tokenizer = open_plain(name, generation, adapter)
    backend = load_backend(choose_backend(recipe, source.config))
    SeedManager(recipe.seed).seed_everything()
    return LoadedModel(backend, backend.load_model(source, recipe), tokenizer, recipe, source)


def open_plain(
    name: str, generation: GenerationSection | None, adapter: str | None
) -> tuple[Recipe, ModelSource, TokenizerUtils]:
    """A model that is no run, before its weights are loaded.

    Returns:
        A recipe that says no more than that, the files with the adapter, and the tokenizer: with the template beside the
        adapter if there is one, else with the model's own.

    Raises: as `load_plain`.
    """
    section = ModelSection(name=name, adapter=adapter)
    source = find_model(section, "--model", with_weights=True, adapter_where="--adapter")
    values: dict[str, Any] = {"model": section, "data": DataSection(train="unused")}
    if source.is_reward:
        if generation and generation.model_fields_set:
            message = "a reward model writes no answers, so generation settings do nothing"
            raise RecipeError(message, where="--set", fix="leave it out", code="no-answers")
        values["training"] = {"method": "reward"}
    else:
        values |= {"training": {"method": "sft"}, "generation": generation or GenerationSection()}
    recipe = Recipe(**values)
    loaded = load_tokenizer(source.folder)
    if source.adapter and (template := read_adapter_template(source.adapter)) is not None:
        loaded.chat_template = template
    # A model without a template of its own gets the prompt as it is.
    tokenizer = TokenizerUtils(
        loaded,
        loss_on=choose_loss_on(recipe),
        row_formats=() if loaded.chat_template else ("prompt_completion",),
        keeps_ending=source.is_reward,
    )
    return recipe, source, tokenizer


def read_adapter_template(folder: Path) -> str | None:
    """The chat template that an adapter was trained with, if it lies beside it.

    Raises:
        AdapterError: the adapter makes a reward model of its base.
        DataError: the template cannot be read.
    """
    if read_adapter_config(folder, "--adapter").get("task_type") == "SEQ_CLS":
        fix = "name its run with --run"
        raise AdapterError("the adapter is of a reward model", where="--adapter", fix=fix, code="adapter-kind")
    path = folder / CHAT_TEMPLATE
    if not path.is_file():
        return None
    get_logger().info("Prompts are rendered with the template that lies beside the adapter")
    return read_utf8(path)


def read_prompts(path: Path) -> list[list[Message]]:
    """Reads prompts: rows with `prompt` or `messages` in any file that rows can stand in, or text with one prompt a line.

    Raises:
        DataError: no such file, no prompt in a row.
    """
    from utils.data_loading import find_kind, load_rows, read_text_lines

    if find_kind(path) is None:
        return [[{"role": "user", "content": line}] for line in read_text_lines(path)]
    conversations = []
    for row in load_rows(str(path)):
        if isinstance(messages := row.fields.get("messages"), list):
            conversations.append(check_prompt_messages(messages, row.where))
        elif "prompt" in row.fields:
            content = check_text(row.fields["prompt"], "prompt", row.where)
            conversations.append([{"role": "user", "content": content}])
        else:
            fix = f"name a column prompt or messages; columns here: {', '.join(row.fields)}"
            raise DataError("the row has neither prompt nor messages", where=row.where, fix=fix, code="no-prompt")
    return conversations


def check_prompt_messages(messages: list[Any], where: str) -> list[Message]:
    """A conversation to answer: a last assistant turn, as in training rows, is taken off."""
    checked = [check_message(message, index, where) for index, message in enumerate(messages)]
    return checked[:-1] if checked and checked[-1]["role"] == "assistant" else checked
