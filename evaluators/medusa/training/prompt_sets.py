"""Prompts of the speed test: built-in sets, files in the layout of MT-bench, and removal of test prompts from training.

Three disjoint sets: `train` for self-distillation, `calibration` for the choice of the tree and early stopping, `test`
for timing. The built-in sets share no form and no topic. A file of prompts replaces only the built-in test set.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.errors import EvaluationError
from evaluators.medusa.training.prompts import FORMS, PASSAGES, PEOPLE, PLACES, ROLES, TOPICS, Split
from evaluators.prompt_tokens import prompt_tokens

if TYPE_CHECKING:
    from evaluators.medusa.model.causal_lm import Base

FILE_LIMIT_BYTES = 16 << 20
NEAR_DUPLICATE = 0.8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question; `turns` are the messages of the user."""

    id: str
    category: str
    turns: tuple[str, ...]


def builtin(split: Split, seed: int = 0) -> list[Prompt]:
    """All distinct prompts of the split, shuffled by `seed`, with alternating categories."""
    drawn = random.Random(f"{split}-{seed}")
    queues: list[list[Prompt]] = []
    for category, forms in FORMS[split].items():
        queue: dict[str, Prompt] = {}
        for number, form in enumerate(forms):
            for topic in TOPICS[split]:
                text = form.format(**_fields(split, topic, drawn))
                queue.setdefault(text, Prompt(f"{category}:{number}:{topic}", category, (text,)))
        shuffled = list(queue.values())
        drawn.shuffle(shuffled)
        queues.append(shuffled)
    rounds = max(len(queue) for queue in queues)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]


def _fields(split: Split, topic: str, drawn: random.Random) -> dict[str, str | int]:
    """Fields for a form about `topic`."""
    k, m, n = sorted(drawn.sample(range(2, 60), 3))
    other = drawn.choice([each for each in TOPICS[split] if each != topic])
    named = {"who": PEOPLE, "role": ROLES, "place": PLACES, "passage": PASSAGES}
    chosen = {name: drawn.choice(choices[split]) for name, choices in named.items()}
    return {"topic": topic, "other": other, "n": n, "m": m, "k": k, **chosen}


def read(path: Path) -> list[Prompt]:
    """Read JSON lines `{"question_id", "category", "turns": [str, ..]}`. Raises EvaluationError naming the line."""
    if not path.is_file():
        raise _unreadable(f"There is no prompt file {path.name}.")
    if path.stat().st_size > FILE_LIMIT_BYTES:
        raise _unreadable(f"The prompt file {path.name} is larger than {FILE_LIMIT_BYTES >> 20} MiB.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            found.append(_parse(line, f"{path.name} line {number}", number))
    if not found:
        raise _unreadable(f"The prompt file {path.name} contains no prompt.")
    return found


def _parse(line: str, where: str, number: int) -> Prompt:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"{where} is not JSON: {error}.") from error
    turns = row.get("turns") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and _is_text(turn) for turn in turns):
        raise _unreadable(f"{where} has no `turns` list of texts.")
    return Prompt(str(row.get("question_id", number)), str(row.get("category", "none")), tuple(turns))


def _is_text(turn: str) -> bool:
    """Return True for text that is not blank and has no lone surrogates."""
    return bool(turn.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in turn)


def _unreadable(message: str) -> EvaluationError:
    return EvaluationError(
        "SPEED_CHECK_FAILED", message, 'Give JSON lines like {"question_id": 1, "category": "math", "turns": ["..."]}.'
    )


def in_turns(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """First `count` prompts with alternating categories, in file order within each."""
    queues: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.category, []).append(prompt)
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)][:count]


def apart(
    learnt: Sequence[Prompt], held_out: Sequence[Prompt], test: Sequence[Prompt], most_held_out: int
) -> tuple[list[Prompt], list[Prompt], list[str]]:
    """(training, held-out, ids of dropped prompts), without near duplicates among them and the test prompts."""
    others, leaked = without_leaks(held_out, test)
    others = others[:most_held_out]
    kept, dropped = without_leaks(learnt, [*test, *others])
    return kept, others, [*leaked, *dropped]


def without_leaks(train: Sequence[Prompt], test: Sequence[Prompt]) -> tuple[list[Prompt], list[str]]:
    """(training prompts without near duplicates of a test turn, ids of dropped prompts).

    Near duplicates are equal after folding case and spaces, or have a Jaccard similarity of word 8-grams above 0.8.
    """
    forbidden = [_fold(turn) for prompt in test for turn in prompt.turns]
    exact = set(forbidden)
    sharing: dict[tuple[str, ...], list[frozenset[tuple[str, ...]]]] = {}  # near duplicates share a gram
    for grams in map(_grams, forbidden):
        for gram in grams:
            sharing.setdefault(gram, []).append(grams)

    def leaks(turn: str) -> bool:
        grams = _grams(turn)
        return turn in exact or any(_alike(grams, other) for gram in grams for other in sharing.get(gram, ()))

    kept: list[Prompt] = []
    dropped: list[str] = []
    for prompt in train:
        if any(leaks(_fold(turn)) for turn in prompt.turns):
            dropped.append(prompt.id)
        else:
            kept.append(prompt)
    return kept, dropped


def fingerprint(turn: str) -> str:
    """Hash of a question after folding case and spaces, 16 hexadecimal digits."""
    return hashlib.sha256(_fold(turn).encode()).hexdigest()[:16]


def unlearnt(test: Sequence[Prompt], learnt: Collection[str]) -> tuple[list[Prompt], list[str]]:
    """(questions without a turn whose fingerprint is in `learnt`, ids of the others)."""
    known = [any(fingerprint(turn) in learnt for turn in prompt.turns) for prompt in test]
    marked = list(zip(test, known, strict=True))
    return [prompt for prompt, seen in marked if not seen], [prompt.id for prompt, seen in marked if seen]


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _grams(folded: str) -> frozenset[tuple[str, ...]]:
    words = folded.split()
    return frozenset(tuple(words[at : at + 8]) for at in range(len(words) - 7))


def _alike(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> bool:
    """Return True if two sets of grams, not both empty, are nearly equal."""
    return len(left & right) / len(left | right) > NEAR_DUPLICATE


def takes_turns(base: Base) -> bool:
    """Return True if the tokenizer has a working chat template; without one `encode` uses plain text."""
    return _rendered(base.tokenizer, "Hello.", ()) is not None


def _rendered(tokenizer: Any, text: str, history: Sequence[tuple[str, str]]) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    said = [(role, part) for turn in history for role, part in zip(("user", "assistant"), turn, strict=True)]
    messages = [{"role": role, "content": part} for role, part in (*said, ("user", text))]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) or None
    except Exception:  # an untrusted template can raise anything; plain text is the documented fallback
        return None


def encode(base: Base, text: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Token ids of one user turn, by the chat template if it works, else as plain text.

    `history` holds the earlier turns with their answers. Raises EvaluationError SPEED_CHECK_FAILED for tokens that the
    model does not have.
    """
    tokenizer = base.tokenizer
    rendered = _rendered(tokenizer, text, history)
    if rendered is not None:
        ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        ids = prompt_tokens(tokenizer, "\n".join([part for turn in history for part in turn] + [text]))
    ids = ids or ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [0])
    if max(ids) >= base.vocab:
        raise EvaluationError(
            "SPEED_CHECK_FAILED",
            f"The tokenizer produces token {max(ids)}, but the model has only {base.vocab} tokens.",
            "Check the tokenizer policy of the merge.",
        )
    return ids


def shortened(base: Base, ids: list[int], new_tokens: int) -> list[int]:
    """Cut the start of a prompt if prompt and answer exceed the context.

    `new_tokens` are reserved for the answer, at most half of the context.
    """
    # Also for rope `dynamic`: beyond this length a batch gives other answers than its prompts alone.
    context = base.max_positions
    return ids if context is None else ids[-max(1, context // 2, context - new_tokens) :]
