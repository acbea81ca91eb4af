"""Prompts for the speed check: built-in ones, files in MT-bench's layout, and the guard against test leaks.

Three disjoint sets: `train` feeds self-distillation, `calibration` picks the tree and stops the training, `test` is
timed. The built-in sets share templates but no topic. A file of prompts replaces the built-in test set only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evaluators.errors import EvaluationError
from evaluators.medusa.adapters import Base

Split = Literal["train", "calibration", "test"]
FILE_LIMIT_BYTES = 16 << 20
NEAR_DUPLICATE = 0.8

# The eight categories of MT-bench (arXiv 2306.05685), so that built-in and given test sets can be read side by side.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "writing": (
        "Write a short essay about {}.",
        "Write an email to a colleague who wants to learn about {}.",
        "Describe {} in vivid language for a travel magazine.",
    ),
    "roleplay": (
        "You are a museum guide. Tell your visitors about {}.",
        "Pretend to be a grandfather who explains {} to a child.",
    ),
    "reasoning": (
        "What are the advantages and disadvantages of {}?",
        "Compare {} with its most common alternative, step by step.",
    ),
    "math": (
        "Make up a word problem about {} that needs two steps of arithmetic, and solve it.",
        "A shop sells 12 items connected with {} a day at 3 dollars each. How much does it earn in a week? Explain.",
    ),
    "coding": (
        "Write a Python function that stores and sorts a list of records about {}.",
        "Write a small Python class that represents {} and print an example.",
    ),
    "extraction": (
        "List five facts about {} as a numbered list.",
        "Make a table with two columns, term and meaning, about {}.",
    ),
    "stem": (
        "Explain the science behind {} to a student.",
        "How does {} work? Name the main parts and what each does.",
    ),
    "humanities": (
        "What is the history of {}?",
        "Why is {} important for society?",
    ),
}
TOPICS: dict[Split, tuple[str, ...]] = {
    "train": (
        "bicycles", "solar energy", "the printing press", "bread baking", "volcanoes", "public libraries", "chess",
        "rainforests", "electric cars", "the Roman Empire", "beekeeping", "photography", "river dams", "vaccines",
        "jazz music", "coffee", "earthquakes", "online learning", "wind turbines", "gardening", "the Silk Road",
        "satellites", "swimming", "recycling", "the human heart", "railways", "theatre", "whales", "cheese making",
        "the stock market", "mountain hiking", "clocks", "bridges", "weather forecasts", "sleep", "tea ceremonies",
        "robots", "glass", "elections", "marathon running", "the periodic table", "dolphins", "paper", "castles",
        "computer networks", "the sense of smell", "wheat farming", "cinema",
    ),
    "calibration": (
        "lighthouses", "the immune system", "pottery", "city parks", "sailing ships", "honey", "gravity", "museums",
        "batteries", "folk dances", "the moon", "markets",
    ),
    "test": (
        "telescopes", "the ancient Olympic Games", "public transport", "chocolate", "coral reefs", "violins",
        "steam engines", "vegetable soup", "penguins", "maps", "the water cycle", "newspapers",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question; `turns` are what the user says. Only the first turn is used in quick mode."""

    id: str
    category: str
    turns: tuple[str, ...]


def builtin(split: Split, seed: int = 0) -> list[Prompt]:
    """All templates on all topics of the split, shuffled by `seed`, categories taking turns."""
    shuffled = random.Random(f"{split}-{seed}")
    queues: list[list[Prompt]] = []
    for category, templates in TEMPLATES.items():
        queue = [
            Prompt(f"{category}:{template_number}:{topic}", category, (template.format(topic),))
            for template_number, template in enumerate(templates)
            for topic in TOPICS[split]
        ]
        shuffled.shuffle(queue)
        queues.append(queue)
    rounds = max(len(queue) for queue in queues)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]


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
        raise _unreadable(f"The prompt file {path.name} holds no prompt.")
    return found


def _parse(line: str, where: str, number: int) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise _unreadable(f"{where} is not JSON: {error}.") from error
    turns = row.get("turns") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise _unreadable(f"{where} has no `turns` list of texts.")
    return Prompt(str(row.get("question_id", number)), str(row.get("category", "none")), tuple(turns))


def _unreadable(message: str) -> EvaluationError:
    return EvaluationError(
        "SPEED_CHECK_FAILED", message, 'Give JSON lines like {"question_id": 1, "category": "math", "turns": ["..."]}.'
    )


def in_turns(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts with the categories taking turns, in file order inside each."""
    queues: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.category, []).append(prompt)
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)][:count]


def without_leaks(train: Sequence[Prompt], test: Sequence[Prompt]) -> tuple[list[Prompt], list[str]]:
    """Training prompts none of whose turns is, or nearly is, a turn of the test set; and the ids of the dropped ones.

    Equal after folding case and spaces, or Jaccard similarity of word 8-grams above 0.8.
    """
    forbidden = [_fold(turn) for prompt in test for turn in prompt.turns]
    exact, grams = set(forbidden), [_grams(turn) for turn in forbidden]
    kept: list[Prompt] = []
    dropped: list[str] = []
    for prompt in train:
        folded = [_fold(turn) for turn in prompt.turns]
        leaks = any(turn in exact or any(_alike(_grams(turn), other) for other in grams) for turn in folded)
        if leaks:
            dropped.append(prompt.id)
        else:
            kept.append(prompt)
    return kept, dropped


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _grams(folded: str) -> frozenset[tuple[str, ...]]:
    words = folded.split()
    return frozenset(tuple(words[at : at + 8]) for at in range(len(words) - 7))


def _alike(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> bool:
    return bool(left and right) and len(left & right) / len(left | right) > NEAR_DUPLICATE


def encode(base: Base, text: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """The token ids the model sees for one user turn: its chat template if it has one that works, else plain text.

    `history` holds the turns before it, each with its answer.
    """
    tokenizer = base.tokenizer
    rendered = None
    if getattr(tokenizer, "chat_template", None):
        try:
            said = [(role, part) for turn in history for role, part in zip(("user", "assistant"), turn, strict=True)]
            messages = [{"role": role, "content": part} for role, part in (*said, ("user", text))]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a stranger's template may raise anything; plain text is the documented fallback
            rendered = None
    text = "\n".join([part for turn in history for part in turn] + [text])
    ids: list[int] = tokenizer(rendered or text, add_special_tokens=rendered is None)["input_ids"]
    ids = ids or ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [0])
    if max(ids) >= base.vocab:
        raise EvaluationError(
            "SPEED_CHECK_FAILED",
            f"The tokenizer produces token {max(ids)}, but the model has only {base.vocab} tokens.",
            "Check the tokenizer policy of the merge.",
        )
    # A prompt may fill half the context, so that there is something left to generate into.
    return ids if base.max_positions is None else ids[-max(1, base.max_positions // 2) :]
