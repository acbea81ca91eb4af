"""Chat templates in the files of a published model: known ones are kept, unknown ones left out.

A template is a program that runs wherever the model is used (docs/design/reliability.md 4.5). It is recognised by its
text, in any file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.model_files import TEMPLATE
from bot.merge.recipe.notices import Notes
from bot.merge.tokenizer.named_templates import TEMPLATES

LIMIT_BYTES = 64 << 10
# sha256 of the text without white space around it -> whose it is
KNOWN = {
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "SmolLM2-Instruct (ChatML with a system text)",
}
_NAMED = frozenset(text.strip() for text in TEMPLATES.values())
# files whose key `chat_template` transformers reads
_HOLDERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_KEY = "chat_template"


def is_known(template: object) -> bool:
    """True if a template may be published."""
    if not isinstance(template, str) or len(template) > LIMIT_BYTES:
        return False
    text = template.strip()
    return text in _NAMED or hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() in KNOWN


def known_only(name: str, source: Checkpoint, written: str | None, notes: Notes) -> str | None:
    """Replacement of the file `name`, of the source, or of the text `written` by the merge; "" to leave it out.

    None if all its templates are known. Each file that loses one gets a notice.
    """
    text = None if name not in (*_HOLDERS, TEMPLATE) else source.text(name) if written is None else written
    if text is None:
        return None
    if name == TEMPLATE:
        kept = text if is_known(text) else ""
    else:
        kept = _without_unknown(text, json.loads(written) if written is not None else source.document(name) or {})
    if kept == text:
        return None
    notice = f"a chat template in {name} of {source.name} is not on the bot's list and is left out"
    notes.add("TEMPLATE_DROPPED", notice, notice)
    return kept


def _without_unknown(text: str, document: dict[str, Any]) -> str:
    """`document`, whose text is `text`, as JSON without the unknown templates; empty if nothing else is in it."""
    given = document.pop(_KEY, None)
    known = _known(given)
    if known == given:
        return text
    if known:
        document[_KEY] = known
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n" if document else ""


def _known(given: Any) -> Any:
    """The part of a `chat_template` value that is kept: a text, a list of names and texts, or a mapping of them."""
    if isinstance(given, list):
        return [each for each in given if isinstance(each, Mapping) and is_known(each.get("template"))]
    if isinstance(given, Mapping):
        return {name: text for name, text in given.items() if is_known(text)}
    return given if is_known(given) else None
