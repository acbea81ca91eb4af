"""The chat template of the output: `auto` takes the sources' most common one, raw Jinja is taken as written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoint import Checkpoint
from bot.merge.notices import Notes
from bot.merge.spec import ModelRef, Recipe

FILE = "chat_template.jinja"
_NAMED = ("chatml", "llama3", "alpaca", "mistral", "exaone")


def chat_template(recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint], notes: Notes) -> str | None:
    """The text of the template a recipe asks for; None if it asks for none or no source has one."""
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted in _NAMED:
        raise Refused(
            "NOT_SUPPORTED", f"the named chat template {wanted} is not supported yet.",
            "Write `chat_template: auto`, or the Jinja text itself.", value=wanted,
        )  # fmt: skip
    if wanted != "auto":
        if "{" not in wanted or len(wanted) < 20:
            raise Refused(
                "VALUE_OUT_OF_RANGE", "`chat_template` is neither a known name nor a Jinja template.",
                "Write `auto` or a template of at least 20 characters.", value=wanted,
            )  # fmt: skip
        return wanted
    found = [text for ref in recipe.sources if (text := _of(checkpoints[ref])) is not None]
    if not found:
        notes.add("NO_CHAT_TEMPLATE", "no source has a chat template")
        return None
    return max(found, key=lambda text: (found.count(text), -found.index(text)))


def without_template(config_text: str) -> str:
    """tokenizer_config.json without a template of its own, which would hide the file's."""
    loaded: dict[str, Any] = json.loads(config_text)
    loaded.pop("chat_template", None)
    return json.dumps(loaded, ensure_ascii=False, indent=2) + "\n"


def _of(checkpoint: Checkpoint) -> str | None:
    text = checkpoint.text(FILE, 2**20)
    if text is not None:
        return text.strip()
    config = checkpoint.text("tokenizer_config.json", 16 * 2**20)
    try:
        given = json.loads(config).get("chat_template") if config else None
    except (ValueError, AttributeError):
        return None
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, dict):
        given = given.get("default")
    return given.strip() if isinstance(given, str) else None
