"""Chat templates: which one a run uses, and rendering conversations with it as transformers does.

A run has one template. It is the model's own, a shipped one (`utils/templates/`), a `.jinja` file or Jinja text in the recipe.
The text is saved with what the run trains and used by every later script.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2

from utils.exceptions import DataError, ModelLoadingError, RecipeError
from utils.messages import Message
from utils.template_limits import TemplateLimitError
from utils.template_sandbox import REASONING_FIELDS, TEMPLATE_ERRORS, compile_template, run_template

TEMPLATES = Path(__file__).parent / "templates"
OWN = "model"
WAY_OUT = "set data.strategy: standard, name a template in data.template, or choose an instruction-tuned model"
Strategy = Literal["chat", "standard"]


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a run.

    Attributes:
        name: `model` for the model's own, a shipped name, the path of a file, or `recipe` for text in the recipe.
        source: its Jinja text.
    """

    name: str
    source: str

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the source: two runs with one hash saw the same prompts."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens that a shipped template says it needs in its header."""
        found = re.match(r"\{#-?.*?Control tokens: ([^\n]*?)\.?\s*-?#\}", self.source, re.DOTALL)
        return tuple(found[1].split()) if found and self.name in list_shipped() else ()


def list_shipped() -> list[str]:
    """Names of the shipped templates, sorted."""
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


def choose_strategy(asked: str, model_template: object) -> Strategy:
    """The strategy that `auto` stands for: chat where the model has a template."""
    return "chat" if asked == "chat" or (asked == "auto" and model_template) else "standard"


def resolve_template(
    name: str,
    *,
    strategy: str,
    model_template: str | Mapping[str, str] | None,
    row_formats: Collection[str] = (),
    where: str = "data.template",
) -> ChatTemplate:
    """Finds the one template of a run and checks that it compiles.

    Args:
        name: auto, a shipped name, the path of a `.jinja` file, or Jinja text.
        strategy: auto, chat or standard. On auto, the template is the model's own where there is one; else as under standard,
            `raw` for rows of prompt and completion and `alpaca` for all others.
        model_template: the model's own template, or several by name.
        row_formats: formats of the rows; also `tools` where some row has tools, which picks the template `tool_use` of a
            model that brings several.
        where: place of the name in the recipe.

    Raises:
        RecipeError: no such template, a file that cannot be read, or text that is not Jinja.
        ModelLoadingError: the model's own template is damaged.
    """
    template = find_template(name, strategy, model_template, row_formats, where)
    try:
        compile_template(template.source)
    except jinja2.TemplateSyntaxError as error:
        place = f"{template.name}:{error.lineno}" if template.name.endswith(".jinja") else f"line {error.lineno}"
        raise make_source_error(template, f"the template is not Jinja: {error.message}", place, where) from error
    except jinja2.TemplateError as error:
        raise make_source_error(template, f"the template is refused: {error}", template.name, where) from error
    return template


def make_source_error(template: ChatTemplate, message: str, place: str, where: str) -> RecipeError | ModelLoadingError:
    """The complaint about a template that does not compile, to whoever wrote it."""
    if template.name == OWN:
        fix = f"name another one in data.template: {', '.join(list_shipped())}"
        return ModelLoadingError(f"{message} ({place} of the model's own)", fix=fix, code="template-syntax")
    if template.name.endswith(".jinja"):
        return RecipeError(message, where=place, fix="correct the file", code="template-syntax")
    return RecipeError(f"{message} ({place})", where=where, fix="correct data.template", code="template-syntax")


def find_template(
    name: str, strategy: str, model_template: str | Mapping[str, str] | None, row_formats: Collection[str], where: str
) -> ChatTemplate:
    """The template of a name, not yet checked."""
    if name == "auto":
        if choose_strategy(strategy, model_template) == "chat":
            return ChatTemplate(OWN, choose_own(model_template, row_formats))
        conversations = set(row_formats) - {"text", "tools", "thinking"}
        name = "raw" if conversations == {"prompt_completion"} else "alpaca"
    if "{{" in name or "{%" in name:
        return ChatTemplate("recipe", name)
    path = Path(name)
    if path.suffix != ".jinja":
        if name not in list_shipped():
            near = get_close_matches(name, ["auto", *list_shipped()], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            fix = f"{hint}templates: auto, {', '.join(list_shipped())}, the path of a .jinja file, or Jinja text"
            raise RecipeError(f"there is no template {name!r}", where=where, fix=fix, code="no-template")
        path = TEMPLATES / f"{name}.jinja"
    try:
        return ChatTemplate(name, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = f"correct the path, or take one of {', '.join(list_shipped())}"
        raise RecipeError(f"there is no template {name!r}", where=where, fix=fix, code="no-template") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise RecipeError(
            f"{name} cannot be read: {reason}", where=where, fix="check the file", code="no-template"
        ) from error


def choose_own(model_template: str | Mapping[str, str] | None, row_formats: Collection[str]) -> str:
    """The model's own template; of several, the one for tools where rows have tools, else the default one."""
    if isinstance(model_template, Mapping):
        wanted = ["tool_use", "default"] if "tools" in row_formats else ["default"]
        for key in (*wanted, *sorted(model_template)):
            if model_template.get(key):
                return str(model_template[key])
    if not model_template:
        raise RecipeError(
            "this model has no chat template", where="data.strategy", fix=WAY_OUT, code="no-chat-template"
        )
    return str(model_template)


class TemplateRenderer:
    """Renders conversations with one template, the same text as `apply_chat_template` of transformers 5.23.

    One difference is meant: `strftime_now` gives 26 July 2024, so that a run can be repeated and its cache stays valid.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Mapping[str, str]) -> None:
        """Takes the template and what else it sees: `bos_token`, `eos_token` and so on."""
        self.template = template
        self.special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: the conversation.
            tools: function schemas.
            prompt: end with what makes the assistant speak.

        Raises:
            DataError: the template refuses these messages, fails on them, or runs into a limit.
        """
        variables = {
            **self.special_tokens,
            "messages": [make_plain_message(message) for message in messages],
            "tools": [make_plain(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        try:
            return run_template(self.template.source, variables)
        except TEMPLATE_ERRORS as error:
            raise explain(error) from error


def explain(error: BaseException) -> DataError:
    """What a template did wrong, in words."""
    fix = "set data.template to another template"
    if isinstance(error, TemplateLimitError | MemoryError | RecursionError):
        reasons = {MemoryError: "it needs too much memory", RecursionError: "it calls itself without end"}
        reason = reasons.get(type(error), str(error))
        return DataError(f"the chat template is stopped: {reason}", fix=fix, code="template-limit")
    return DataError(f"the chat template refuses this conversation: {error}", fix=fix, code="template")


def make_plain_message(message: Message) -> Message:
    """A copy in which nothing is null, and thinking stands under the names that templates read."""
    plain = {key: make_plain(value) for key, value in message.items() if value is not None}
    if (reasoning := next((plain[key] for key in REASONING_FIELDS if key in plain), None)) is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def make_plain(value: Any) -> Any:
    """A copy out of plain JSON types: a template must not reach our objects, nor change them."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {make_plain(key): make_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [make_plain(item) for item in value]
    return str(value)
