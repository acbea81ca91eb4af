"""Chat template of the output: `auto` takes the sources' most common one; raw Jinja is taken as written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.model_files import NAMED_TEMPLATES, TEMPLATE
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.merge.tokenizer.named_templates import MARKERS, TEMPLATES
from bot.merge.tokenizer.template_files import is_known
from bot.merge.tokenizer.tokenizer import Alignment, read_tokens

_PROCESSOR_FILE = "chat_template.json"


def chat_template(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    alignment: Alignment | None,
    notes: Notes,
    *,
    known_only: bool,
) -> str | None:
    """Text of the requested template; None if the recipe requests none or no source has one.

    With `known_only`, `auto` chooses among the templates that may be published.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted in TEMPLATES:
        _note_markers(wanted, recipe, checkpoints, alignment, notes)
        return TEMPLATES[wanted]
    if wanted != "auto":
        if "{" not in wanted or len(wanted) < 20:
            raise Refused(
                "VALUE_OUT_OF_RANGE",
                "`chat_template` is neither a known name nor a Jinja template.",
                f"Write `auto`, {', '.join(f'`{name}`' for name in TEMPLATES)}, or a template of at least 20 letters.",
                value=wanted,
            )
        return wanted
    found = [text for ref in recipe.sources if (text := _of(checkpoints[ref])) is not None]
    known = [text for text in found if not known_only or is_known(text)]
    if len(known) < len(found):
        notes.add("TEMPLATE_DROPPED", "a source's chat template is not on the bot's list and is not chosen")
    found = known
    if not found:
        notes.add("NO_CHAT_TEMPLATE", "no source has a chat template")
        return None
    return max(found, key=lambda text: (found.count(text), -found.index(text)))


def with_named_templates(checkpoint: Checkpoint, written: str | None) -> str | None:
    """tokenizer_config.json with all chat templates of a source that has a folder of further ones, else None.

    `written` is the text that the merge writes, if any. transformers reads the list, its older format, if there is no
    template file.
    """
    files = sorted(name for name in checkpoint.sizes if name.startswith(f"{NAMED_TEMPLATES}/"))
    config = json.loads(written) if written else checkpoint.document("tokenizer_config.json")
    if not files or config is None:
        return None
    found = {name.rpartition("/")[2].removesuffix(".jinja"): checkpoint.text(name, 2**20) for name in files}
    if TEMPLATE in checkpoint.sizes:
        found = {"default": checkpoint.text(TEMPLATE, 2**20), **found}
    config["chat_template"] = [{"name": name, "template": text} for name, text in found.items()]
    return json.dumps(config, ensure_ascii=False, indent=2) + "\n"


def without_template(tokenizer_config: Mapping[str, Any]) -> str:
    """tokenizer_config.json without a template, which would take precedence over the file's."""
    rest = {key: value for key, value in tokenizer_config.items() if key != "chat_template"}
    return json.dumps(rest, ensure_ascii=False, indent=2) + "\n"


def _note_markers(
    name: str,
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    alignment: Alignment | None,
    notes: Notes,
) -> None:
    """Add a notice about markers of the template that the vocabulary lacks and would split into letters."""
    own = None if alignment is not None else read_tokens(checkpoints[recipe.config_source])
    known = alignment.ids if alignment is not None else None if own is None else own.ids
    lacking = [] if known is None else [marker for marker in MARKERS[name] if marker not in known]
    if lacking:
        notes.add("CHAT_TOKENS_MISSING", f"the vocabulary lacks {', '.join(lacking)} of the chat template {name}")


def _of(checkpoint: Checkpoint) -> str | None:
    text = checkpoint.text(TEMPLATE, 2**20)
    if text is not None:
        return text.strip()
    given = _given(checkpoint, "tokenizer_config.json") or _given(checkpoint, _PROCESSOR_FILE)
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, dict):
        given = given.get("default")
    return given.strip() if isinstance(given, str) else None


def _given(checkpoint: Checkpoint, file: str) -> Any:
    text = checkpoint.text(file, 16 * 2**20)
    try:
        return json.loads(text).get("chat_template") if text else None
    except (ValueError, AttributeError, RecursionError):
        return None
