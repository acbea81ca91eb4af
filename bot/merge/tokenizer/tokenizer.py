"""Vocabulary of the output, and the source rows of each token. docs/design/merging.md 3.2.

Only `tokenizer.json` of fast tokenizers, plain JSON, is read. The planner decides everything as index arrays, by which
the engine gathers rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import Checkpoint, nests_deeper
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef, Recipe, TokenRule

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
LIMIT_BYTES = 64 * 2**20
IDS = 2**24  # ids are below this; the largest vocabularies in use have about 2**20 tokens
SPARE_IDS = 65_536  # by which ids may exceed twice the rows of the matrix they belong to
ROWS_LIMIT = 2**25  # rows of the output times models: the length of all index arrays of one matrix
_LANGUAGE_PARTS = ("text_config", "language_config", "llm_config")
Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenizer: token -> id, the entries of its added tokens, and its JSON."""

    ids: Mapping[str, int]
    added: tuple[Mapping[str, Any], ...]
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The output's vocabulary: `ids` token -> id, `rows` of the matrices, each source's own ids, rules for tokens.

    `texts` are tokenizer files that differ from those of `tokenizer_source`; `added` the tokens that it lacks.
    """

    tokenizer_source: ModelRef
    ids: Mapping[str, int]
    rows: int
    sources: Mapping[ModelRef, Mapping[str, int]]
    rules: Mapping[str, TokenRule]
    base: ModelRef | None
    texts: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()


def read_tokens(checkpoint: Checkpoint) -> Tokens | None:
    """Tokenizer of a source; None without tokenizer.json.

    Raises `Refused(BAD_CHECKPOINT)` if it cannot be read, names no token, or has ids that are not whole numbers from 0
    to 2^24: the largest determines the memory for rows.
    """
    text = checkpoint.text(FILE, LIMIT_BYTES)
    if text is None:
        return None
    try:
        document = json.loads(text)
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] by id
            ids = {str(entry[0]): i for i, entry in enumerate(vocabulary)}
        else:
            ids = dict(vocabulary.items())
        added = tuple(document.get("added_tokens") or ())
        ids.update({str(entry["content"]): entry["id"] for entry in added})
        "".join(ids).encode()  # raises ValueError for half a character
        if nests_deeper(document):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _unreadable(checkpoint) from None
    if not ids:
        raise _bad_ids(checkpoint.name, "names no token")
    for token, i in ids.items():
        if type(i) is not int or not 0 <= i < IDS:  # JSON's true is an int to Python
            raise _bad_ids(checkpoint.name, f"gives {token[:40]!r} the id {str(i)[:40]}, no whole number below {IDS:,}")
    return Tokens(ids, added, document)


def _unreadable(checkpoint: Checkpoint) -> Refused:
    return Refused(
        "BAD_CHECKPOINT",
        f"{checkpoint.name}: {FILE} is not a tokenizer we can read.",
        "Use a source with a fast tokenizer.",
        value=FILE,
    )


def _bad_ids(name: str, what: str) -> Refused:
    return Refused("BAD_CHECKPOINT", f"{name}: {FILE} {what}.", "Use a source with a sound tokenizer.", value=FILE)


def align(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    rows_of: Mapping[ModelRef, int],
    notes: Notes,
) -> Alignment | None:
    """Vocabulary of the output; None if the recipe has no tokenizer keys. `rows_of`: rows of input embeddings.

    Raises `Refused`: NOT_SUPPORTED, BAD_CHECKPOINT, RECIPE_INVALID; TOO_LARGE for too many rows times models.
    """
    wanted = recipe.vocabulary
    if wanted is None:
        return None
    tokenizer_source = wanted.source if isinstance(wanted.source, ModelRef) else recipe.config_source
    own = read_tokens(checkpoints[tokenizer_source])
    if own is None:
        raise Refused(
            "NOT_SUPPORTED",
            f"{tokenizer_source} has no {FILE}, so its vocabulary cannot be used.",
            "Name a model with a fast tokenizer as `tokenizer: {source: owner/name}`.",
            value=str(tokenizer_source),
        )
    _close_to_rows(own, rows_of.get(tokenizer_source), str(tokenizer_source))
    sources: dict[ModelRef, Mapping[str, int]] = {}
    others: list[Tokens] = []
    for ref in recipe.sources:
        tokens = own if ref == tokenizer_source else read_tokens(checkpoints[ref])
        if tokens is None:
            notes.add(
                "TOKENIZER_ASSUMED", f"{ref} has no {FILE}; it is taken to use the tokenizer of {tokenizer_source}"
            )
        sources[ref] = own.ids if tokens is None else tokens.ids
        if tokens is not None and ref != tokenizer_source:
            others.append(_with_rows(tokens, rows_of.get(ref), str(ref), notes))
    entries = _added(own, others if wanted.source == "union" else [], wanted.tokens)
    if entries and len(own.ids) <= max(own.ids.values()):
        notes.add(
            "VOCABULARY_HOLES",
            f"the ids of {tokenizer_source} leave some out, so a reader may number the {len(entries):,} added tokens "
            "otherwise",
        )
    ids = {**own.ids, **{str(entry["content"]): int(entry["id"]) for entry in entries}}
    used = max(ids.values()) + 1
    p = wanted.pad_to_multiple_of
    rows = -(-used // p) * p if p else max(used, rows_of.get(tokenizer_source, 0))
    if rows * len(recipe.sources) > ROWS_LIMIT:
        raise Refused(
            "TOO_LARGE",
            f"aligning {rows:,} tokens of {len(recipe.sources)} models is more than the merge can hold.",
            "Use fewer models, or leave the tokenizer keys out.",
        )
    rules = {rule.token: rule for rule in wanted.tokens}
    for rule in wanted.tokens:
        _check_rule(rule, sources, rows_of)
    texts = _texts(checkpoints[tokenizer_source], own, entries)
    added = tuple(str(entry["content"]) for entry in entries)
    return Alignment(tokenizer_source, ids, rows, sources, rules, recipe.base, texts, added)


def _added(own: Tokens, others: Sequence[Tokens], rules: Sequence[TokenRule]) -> list[dict[str, Any]]:
    """Entries of the tokens that `own` lacks, numbered behind it: source by source, ordinary tokens first."""
    known = set(own.ids)
    out: list[dict[str, Any]] = []
    after = max(own.ids.values(), default=-1) + 1

    def add(token: str, flags: Mapping[str, Any]) -> None:
        if token and token not in known:  # an empty token cannot be added: readers skip it and count on without it
            known.add(token)
            out.append({"id": after + len(out), "content": token, **flags})

    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for tokens in others:
        flags = {str(entry["content"]): {k: entry.get(k, v) for k, v in plain.items()} for entry in tokens.added}
        ordered = sorted(tokens.ids, key=lambda token: (token in flags, tokens.ids[token]))
        for token in ordered:
            add(token, flags.get(token, plain))
    for rule in rules:
        add(rule.token, plain)
    return out


def _close_to_rows(tokens: Tokens, rows: int | None, ref: str) -> None:
    """Refuse ids far beyond the matrix they are rows of: the output would be padded up to them."""
    token, top = max(tokens.ids.items(), key=lambda entry: entry[1])
    if rows is not None and top > 2 * rows + SPARE_IDS:
        raise _bad_ids(ref, f"gives {token[:40]!r} the id {top:,}, while the embedding has {rows:,} rows")


def _with_rows(tokens: Tokens, rows: int | None, ref: str, notes: Notes) -> Tokens:
    """Tokens that have a row in the source's matrix."""
    lacking = {token: i for token, i in tokens.ids.items() if rows is not None and i >= rows}
    if not lacking:
        return tokens
    notes.add(
        "TOKENS_WITHOUT_ROW", f"{ref} has no row for {len(lacking)} of its tokens, such as {next(iter(lacking))[:40]!r}"
    )
    ids = {token: i for token, i in tokens.ids.items() if token not in lacking}
    return Tokens(ids, tuple(entry for entry in tokens.added if str(entry["content"]) in ids), tokens.document)


def _check_rule(
    rule: TokenRule, sources: Mapping[ModelRef, Mapping[str, int]], rows_of: Mapping[ModelRef, int]
) -> None:
    given = rule.source
    if given is None or given.model is None:
        return
    token = rule.token if given.kind == "model" else given.token
    row = sources[given.model].get(token, -1) if token is not None else given.token_id
    rows = rows_of.get(given.model)
    if row is None or row < 0 or (rows is not None and row >= rows):
        raise Refused(
            "RECIPE_INVALID",
            f"{given.model} has no {f'token {token!r}' if token is not None else f'row {given.token_id}'}.",
            f"Name another source for `tokenizer.tokens.{rule.token[:40]}`.",
            value=rule.token,
        )


def _texts(tokenizer_source: Checkpoint, own: Tokens, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not entries:
        return {}
    document = copy.deepcopy(dict(own.document))
    document["added_tokens"] = [*own.added, *entries]
    try:
        out = {FILE: json.dumps(document, ensure_ascii=False, indent=2) + "\n"}
        out[FILE].encode()
    except UnicodeEncodeError:
        raise _unreadable(tokenizer_source) from None
    loaded = tokenizer_source.document(CONFIG_FILE) or {}
    if isinstance(loaded.get("added_tokens_decoder"), dict):
        for entry in entries:
            flags = {key: value for key, value in entry.items() if key != "id"}
            loaded["added_tokens_decoder"][str(entry["id"])] = flags
        out[CONFIG_FILE] = json.dumps(loaded, ensure_ascii=False, indent=2) + "\n"
    return out


def remapped_ids(
    config: Mapping[str, Any], alignment: Alignment, config_source: ModelRef, tokenizer_source_config: Mapping[str, Any]
) -> dict[str, Any]:
    """The `*_token_id` keys of a config of the config source's, by token string, as ids of the output's vocabulary.

    Those of the language model inside count too, and the `*_token_index` by which older configs name an image's token.
    """
    strings = {i: token for token, i in alignment.sources[config_source].items()}

    def one(key: str, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        token = strings.get(value, "")
        return alignment.ids[token] if token in alignment.ids else tokenizer_source_config.get(key, value)

    out: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_index")):
            out[key] = [one(key, item) for item in value] if isinstance(value, list) else one(key, value)
        elif key in _LANGUAGE_PARTS and isinstance(value, dict):
            theirs = tokenizer_source_config.get(key)
            inner = theirs if isinstance(theirs, dict) else {}
            out[key] = {**value, **remapped_ids(value, alignment, config_source, inner)}
    return out
