"""Requests: the content of a form or a card as a `MergeRequest`. Sizes are limited here; nothing is looked up.

`from_form` and `from_card` are the two entry points; the command line uses the first. `bot.service.intake` then checks
the recipe.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Literal, cast

from bot.errors import Refused
from bot.merge.recipe.document import Node, Reader, Sequence, Table, nearest, shown
from bot.merge.recipe.reading import read_yaml, write_yaml

RECIPE_LIMIT_BYTES = 64 * 1024
CARD_LIMIT_BYTES = 1024 * 1024
REQUEST_TAG = "mergebot"
RECIPE_FILE = "mergekit_config.yml"

# The Hub's pattern since huggingface_hub 2.4: linear, where the one before was cubic in a run of empty lines.
FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
REPO_NAME = re.compile(r"^(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")


class Origin(StrEnum):
    FORM = "form"
    CARD = "card"


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Evaluation of a request: a suite by name or `tasks`, `limit` samples per task, and the speed test."""

    suite: str = "quick"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    chat_template: bool = False
    speed: Literal["off", "medusa"] = "off"


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A request as received. `requester` is the visitor's login or the namespace of the tagged repo."""

    requester: str
    origin: Origin
    text: str
    name: str
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    repo: str | None = None
    revision: str | None = None
    reply: Literal["discussion", "none"] = "none"
    run: int = 1

    @property
    def key(self) -> str:
        """Identity of the request by its own text, before any lookup: a repeated request has the same key."""
        asked = {
            "requester": self.requester,
            "origin": self.origin.value,
            "repo": self.repo,
            "text": self.text,
            "name": self.name,
            "evaluate": asdict(self.evaluate),
            "run": self.run,
        }
        canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CardBlock:
    """The `mergebot:` block of a model card: the recipe itself, or the path of a recipe file in the repo."""

    recipe: str | None
    recipe_path: str | None
    name: str | None
    evaluate: EvaluateOptions
    reply: Literal["discussion", "none"]
    run: int
    enabled: bool


def from_form(requester: str, text: str, name: str, evaluate: EvaluateOptions) -> MergeRequest:
    """Request of the form's visitor. Raises Refused RECIPE_TOO_LARGE, REQUEST_INVALID."""
    if len(text.encode("utf-8", "surrogatepass")) > RECIPE_LIMIT_BYTES:
        raise Refused("RECIPE_TOO_LARGE", "The recipe is larger than 64 KiB.", "Shorten it.")
    if not text.strip():
        raise Refused("REQUEST_INVALID", "The recipe is empty.", "Paste a mergekit recipe, or load an example.")
    _check_limit(evaluate.limit)
    return MergeRequest(requester, Origin.FORM, text, _checked_name(name.strip()), evaluate)


def front_matter(readme: str) -> str | None:
    """The YAML metadata of a model card as text; None without metadata."""
    found = FRONT_MATTER.match(readme.removeprefix("\ufeff"))
    if found is None:
        return None
    return "\n" * found.group(1).count("\n") + found.group(2)  # so that lines are those of the card


def read_block(readme: str) -> CardBlock:
    """The request in a card. Raises Refused CARD_NO_REQUEST, CARD_INVALID with the line of the card."""
    metadata = front_matter(readme)
    if metadata is None:
        raise Refused(
            "CARD_NO_REQUEST", "The model card has no metadata block.", "Begin it with `---` and `mergebot:`."
        )
    root = read_yaml(metadata, trust="stranger", file="README.md")
    reader = Reader("README.md", "stranger", "refuse")
    block = reader.mapping(root, "").items.get("mergebot")
    if block is None:
        raise Refused(
            "CARD_NO_REQUEST", "The card carries the tag but no `mergebot:` block.", "Add the block, or remove the tag."
        )
    return _block(reader, reader.mapping(block, "mergebot"))


def from_card(repo: str, revision: str, block: CardBlock, text: str) -> MergeRequest:
    """Request of the namespace that owns the tagged repo; `text` is the recipe, read at the same commit."""
    owner, _, plain_name = repo.partition("/")
    return MergeRequest(
        requester=owner,
        origin=Origin.CARD,
        text=text,
        name=_checked_name(block.name or plain_name),
        evaluate=block.evaluate,
        repo=repo,
        revision=revision,
        reply=block.reply,
        run=block.run,
    )


def unreadable_card(repo: str, revision: str, readme: str) -> MergeRequest:
    """Placeholder for a card that cannot be read as a request, so that its author gets one reply."""
    owner, _, name = repo.partition("/")
    return MergeRequest(
        owner, Origin.CARD, readme[:RECIPE_LIMIT_BYTES], name, repo=repo, revision=revision, reply="discussion"
    )


def _block(reader: Reader, table: Table) -> CardBlock:
    keys = {"version", "run", "recipe", "evaluate", "deliver", "reply", "enabled"}
    reader.unknown(table, "mergebot", keys)
    version = table.items.get("version")
    if version is None or reader.integer(version, "mergebot.version") != 1:
        reader.refuse(
            "CARD_INVALID",
            version or table.line,
            "mergebot.version",
            "The block is not of version 1.",
            "Write `version: 1`.",
        )
    recipe, path = _recipe(reader, table.items.get("recipe"))
    deliver = _mapping(reader, table, "deliver", {"to", "name"})
    _choice(reader, deliver, "to", "mergebot.deliver", "repo", {"repo"})  # the one way to deliver today
    name = deliver.items.get("name") if deliver else None
    reply = _choice(reader, table, "reply", "mergebot", "discussion", {"discussion", "none"})
    run, enabled = table.items.get("run"), table.items.get("enabled")
    return CardBlock(
        recipe=recipe,
        recipe_path=path,
        name=reader.text(name, "mergebot.deliver.name") if name else None,
        evaluate=_evaluate(reader, table),
        reply="none" if reply == "none" else "discussion",
        run=reader.integer(run, "mergebot.run") if run else 1,
        enabled=reader.boolean(enabled, "mergebot.enabled") if enabled else True,
    )


def _recipe(reader: Reader, node: Node | None) -> tuple[str | None, str | None]:
    if isinstance(node, Table):
        return write_yaml(cast(dict[str, object], _plain(node))), None
    path = RECIPE_FILE if node is None else reader.text(node, "mergebot.recipe")
    if not re.fullmatch(r"[\w\-][\w\-./]{0,199}", path) or ".." in path:
        reader.refuse(
            "CARD_INVALID", node, "mergebot.recipe", "The recipe's path leaves the repo.", "Name a file of this repo."
        )
    return None, path


def _plain(node: Node) -> object:
    """The node with every scalar as text: the recipe's own parser converts, exactly as for a file."""
    if isinstance(node, Table):
        return {key: _plain(value) for key, value in node.items.items()}
    if isinstance(node, Sequence):
        return [_plain(item) for item in node.items]
    return None if node.is_null else node.text


def _evaluate(reader: Reader, table: Table) -> EvaluateOptions:
    asked, defaults = (
        _mapping(reader, table, "evaluate", {"suite", "limit", "chat_template", "speed"}),
        EvaluateOptions(),
    )
    if asked is None:
        return defaults
    where, items = "mergebot.evaluate", asked.items
    limit = reader.integer(items["limit"], f"{where}.limit") if "limit" in items else None
    _check_limit(limit)
    speed = _choice(reader, asked, "speed", where, "off", {"off", "medusa"})
    return EvaluateOptions(
        suite=reader.text(items["suite"], f"{where}.suite") if "suite" in items else defaults.suite,
        limit=limit,
        chat_template=reader.boolean(items["chat_template"], f"{where}.chat_template")
        if "chat_template" in items
        else False,
        speed="medusa" if speed == "medusa" else "off",
    )


def _mapping(reader: Reader, table: Table, key: str, valid: set[str]) -> Table | None:
    node = table.items.get(key)
    if node is None:
        return None
    found = reader.mapping(node, f"mergebot.{key}")
    reader.unknown(found, f"mergebot.{key}", valid)
    return found


def _choice(reader: Reader, table: Table | None, key: str, path: str, default: str, valid: set[str]) -> str:
    node = table.items.get(key) if table else None
    if node is None:
        return default
    word = reader.text(node, f"{path}.{key}")
    if word not in valid:
        reader.refuse("CARD_INVALID", node, f"{path}.{key}", f"`{path}.{key}` is {shown(word)}.", nearest(word, valid))
    return word


def _checked_name(name: str) -> str:
    if not REPO_NAME.match(name):
        raise Refused(
            "REQUEST_INVALID", "This is not a repo name.",
            "Use letters, digits, `.`, `_` and `-`, at most 96, starting with a letter or digit.", value=name,
        )  # fmt: skip
    return name


def _check_limit(limit: int | None) -> None:
    if limit is not None and not 1 <= limit <= 10_000:
        raise Refused("REQUEST_INVALID", f"A limit of {limit} samples is not possible.", "Choose 1 to 10000.")
