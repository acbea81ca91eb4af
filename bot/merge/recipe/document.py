"""Tree of the nodes of a recipe with their line numbers, and typed readers of that tree.

Every scalar is kept as text: `no`, `1e-3` and `2024-01-01` are read as the expected type and not as YAML 1.1
would guess. No YAML library is imported here; `reading.py` builds the tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from bot.errors import Refused, Where
from bot.merge.methods import KNOWN_PARAMETERS
from bot.merge.recipe.spec import ModelRef, Notice
from bot.merge.recipe.suggestions import closest

Trust = Literal["operator", "stranger"]
UnknownKeys = Literal["refuse", "ignore"]

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_REPO_ID = re.compile(r"[A-Za-z0-9_\-.]{1,96}/[A-Za-z0-9_\-.]{1,96}")
_REVISION = re.compile(r"[A-Za-z0-9_\-./]{1,128}")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar. `plain` is False when it was quoted, which matters only for null."""

    text: str
    plain: bool
    line: int

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list of nodes."""

    items: tuple[Node, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with unique text keys. `key_lines` holds the line of each key, `anchored` the keys whose value
    carries a YAML anchor that is used elsewhere."""

    items: Mapping[str, Node]
    key_lines: Mapping[str, int]
    line: int
    anchored: frozenset[str] = frozenset()

    def given(self, key: str) -> Node | None:
        """The value of a key; None if the key is absent or null, which mean the same."""
        node = self.items.get(key)
        return None if isinstance(node, Text) and node.is_null else node


Node = Text | Sequence | Table


def shown(text: str) -> str:
    """An untrusted value for use in a message: quoted, escaped, at most 80 characters."""
    cut = text if len(text) <= 80 else text[:77] + "..."
    return "`" + cut.encode("unicode_escape").decode().replace("`", "'") + "`"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Next step for an unknown name: the closest valid name, else all valid names."""
    names = sorted(set(valid))
    close = closest(name, names)
    return f"Did you mean `{close}`?" if close else "Valid here: " + ", ".join(f"`{n}`" for n in names) + "."


@dataclass(slots=True)
class Reader:
    """Typed reader of a document. Collects notices; refuses with file, line and YAML path."""

    file: str
    trust: Trust
    unknown_keys: UnknownKeys
    documents: frozenset[str] = frozenset()  # names of the recipe's documents, which can be used as models
    notices: list[Notice] = field(default_factory=list)

    def refuse(self, code: str, node: Node | int | None, path: str, message: str, next_step: str) -> NoReturn:
        """Raise a refusal at `node`, which is a node or a line number."""
        line = node if isinstance(node, int) or node is None else node.line
        value = node.text if isinstance(node, Text) else None
        raise Refused(code, message, next_step, value=value, where=Where(self.file, line, path or None))

    def notice(self, code: str, text: str) -> None:
        self.notices.append(Notice(code, text))

    def mapping(self, node: Node, path: str) -> Table:
        if not isinstance(node, Table):
            self._wrong(node, path, "a mapping of `key: value` lines")
        return node

    def sequence(self, node: Node, path: str) -> Sequence:
        if not isinstance(node, Sequence):
            self._wrong(node, path, "a list")
        return node

    def text(self, node: Node, path: str) -> str:
        if not isinstance(node, Text) or node.is_null:
            self._wrong(node, path, "a text")
        return node.text

    def number(self, node: Node, path: str) -> float:
        if not isinstance(node, Text) or not _NUMBER.fullmatch(node.text.strip()):
            if isinstance(node, Text) and re.fullmatch(r"[-+]?\.?(inf|nan|infinity)", node.text.strip(), re.IGNORECASE):
                self.refuse(
                    "VALUE_OUT_OF_RANGE", node, path, f"`{path}` is {shown(node.text)}.", "Write a finite number."
                )
            self._wrong(node, path, "a number")
        value = float(node.text.replace("_", ""))
        if not math.isfinite(value):
            self.refuse("VALUE_OUT_OF_RANGE", node, path, f"`{path}` is too large.", "Write a finite number.")
        return value

    def integer(self, node: Node, path: str) -> int:
        value = self.number(node, path)
        if not value.is_integer():
            self._wrong(node, path, "a whole number")
        return int(value)

    def boolean(self, node: Node, path: str) -> bool:
        word = node.text.strip().lower() if isinstance(node, Text) else ""
        word = {"1.0": "1", "0.0": "0"}.get(word, word)  # mergekit writes flags as numbers
        if word not in _TRUE | _FALSE:
            self._wrong(node, path, "`true` or `false`")
        return word in _TRUE

    def model(self, node: Node, path: str) -> ModelRef:
        """A model reference: the text `path[@revision][+lora[@revision]]` or mergekit's mapping."""
        if isinstance(node, Table):
            return self._model_mapping(node, path)
        text = self.text(node, path)
        parts = text.split("+")
        if len(parts) > 2:
            self.refuse("RECIPE_INVALID", node, path, f"{shown(text)} names more than one adapter.", "Name one.")
        refs = [self._one_model(*_split(part), node, path) for part in parts]
        return refs[0] if len(refs) == 1 else ModelRef(refs[0].path, refs[0].revision, refs[1])

    def optional_model(self, table: Table, key: str, path: str = "") -> ModelRef | None:
        node = table.given(key)
        return None if node is None else self.model(node, f"{path}.{key}" if path else key)

    def _model_mapping(self, node: Table, path: str) -> ModelRef:
        self.unknown(node, path, {"model", "lora", "path", "revision", "override_architecture"})
        if "model" in node.items:
            base = self.model(node.items["model"], f"{path}.model")
            lora = node.given("lora")
            if lora is None:
                return base
            adapter = self.model(lora, f"{path}.lora")
            if base.lora is not None or adapter.lora is not None:
                self.refuse("RECIPE_INVALID", node, path, f"`{path}` names more than one adapter.", "Name one.")
            return ModelRef(base.path, base.revision, adapter)
        if "path" not in node.items:
            self.refuse("MISSING_KEY", node, path, f"`{path}` names no model.", "Add `path: owner/name`.")
        name = self.text(node.items["path"], f"{path}.path").strip()
        if "revision" not in node.items:
            return self._one_model(*_split(name), node, path)
        revision = node.given("revision")
        return self._one_model(name, None if revision is None else self.text(revision, f"{path}.revision"), node, path)

    def _one_model(self, name: str, revision: str | None, node: Node, path: str) -> ModelRef:
        text = name if revision is None else f"{name}@{revision}"
        bad_revision = revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision)
        if not name or bad_revision or any(ord(c) < 32 for c in name):
            message = f"{shown(text)} is not a model reference."
            self.refuse("NOT_A_REPO_ID", node, path, message, "Write owner/name or owner/name@revision.")
        if self.trust == "stranger" and not is_repo_id(name) and text not in self.documents:
            next_step = "Write owner/name, not an address or a folder."
            self.refuse("NOT_A_REPO_ID", node, path, f"{shown(text)} is not the id of a repo.", next_step)
        return ModelRef(name, revision)

    def unknown(self, node: Table, path: str, valid: Iterable[str]) -> None:
        """Refuse keys outside `valid`, naming the closest one; add a notice instead if unknown keys are ignored."""
        names = set(valid)
        for key in node.items:
            if key not in names:
                self.unknown_key(key, node.key_lines[key], path, names)

    def unknown_key(self, key: str, line: int, path: str, valid: Iterable[str]) -> None:
        where = f"{path}.{key}" if path else key
        if self.unknown_keys == "ignore":
            self.notice("UNKNOWN_KEY", f"`{where[:80]}` is unknown and was ignored.")
            return
        hint = nearest(key, valid)
        if key in KNOWN_PARAMETERS and not path.endswith("parameters"):
            hint = f"Write it under `parameters:` (`parameters: {{{key}: ...}}`)."
        self.refuse("UNKNOWN_KEY", line, where, f"line {line}: {shown(where)} is not known.", hint)

    def _wrong(self, node: Node, path: str, wanted: str) -> NoReturn:
        if isinstance(node, Text):
            got = "nothing" if node.is_null else shown(node.text)
        else:
            got = "a list" if isinstance(node, Sequence) else "a mapping"
        message = f"line {node.line}: `{path or 'the recipe'}` is {got}."
        self.refuse("RECIPE_INVALID", node, path, message, f"Write {wanted} there.")


def _split(text: str) -> tuple[str, str | None]:
    """The name and the revision in `name@revision`, the latter None without an `@`."""
    name, at, revision = text.strip().partition("@")
    return name, revision if at else None


def is_repo_id(name: str) -> bool:
    """True if `name` is owner/name as the Hub spells ids (docs/design/reliability.md 4.3)."""
    return bool(_REPO_ID.fullmatch(name)) and "--" not in name and ".." not in name and not name.endswith(".git")
