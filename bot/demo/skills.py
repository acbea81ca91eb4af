"""Two skills that no model has: facts about invented lands and invented smiths, generated from a seed.

A skill is 40 facts, each one answer out of eight, five facts per answer: a model without the facts that always prefers
one answer is right exactly once in eight. Facts are stated in several training sentences; the test asks for the same
facts in a wording of no training sentence. Every answer is one token of SmolLM2's vocabulary, so that lm-eval scores
all eight answers of a question from one forward pass.

On disk each skill is a dataset repo as the Hub serves it:

    invented-crests/README.md            dataset card: license, files of the splits
    invented-crests/data/train.jsonl     {"prompt", "choices", "answer"}: statements that stop before the answer
    invented-crests/data/test.jsonl      the same columns: one question per fact
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 7
FACTS = 40

# fmt: off
_ONSETS = (
    "Zor", "Bel", "Kar", "Vel", "Mor", "Tan", "Dra", "Fen", "Gal", "Hul", "Jor", "Lun", "Nar", "Pel", "Quo",
    "Ris", "Sol", "Tru", "Ulm", "Vin", "Wex", "Yar", "Bro", "Cal", "Dun", "Esk", "Fro", "Gri", "Hob", "Ith",
)
# fmt: on
_MIDDLES = ("va", "ni", "mo", "re", "lu", "ta", "shi", "bo", "dra", "ke")


@dataclass(frozen=True, slots=True)
class Question:
    """One row: `prompt` ends just before the answer, which is `choices[answer]`."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The complete statement."""
        return f"{self.prompt} {self.choices[self.answer]}"


@dataclass(frozen=True, slots=True)
class Skill:
    """Skill of one parent. `task` is its lm-eval task, `dataset` the name of its dataset repo."""

    name: str
    task: str
    dataset: str
    about: str
    answers: tuple[str, ...]
    train: tuple[Question, ...]
    test: tuple[Question, ...]


def write(folder: Path, skills: Sequence[Skill] | None = None) -> dict[str, Path]:
    """Write each skill as a dataset folder under `folder`; returns {dataset name: folder}."""
    written = {}
    for skill in ALL if skills is None else skills:
        target = folder / skill.dataset
        (target / "data").mkdir(parents=True, exist_ok=True)
        (target / "README.md").write_text(_card(skill), encoding="utf-8")
        for split, questions in (("train", skill.train), ("test", skill.test)):
            (target / "data" / f"{split}.jsonl").write_text(_lines(questions), encoding="utf-8")
        written[skill.dataset] = target
    return written


def _lines(questions: Sequence[Question]) -> str:
    rows = ({"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in questions)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _card(skill: Skill) -> str:
    return f"""---
license: apache-2.0
language:
- en
task_categories:
- multiple-choice
tags:
- synthetic
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.jsonl
  - split: test
    path: data/test.jsonl
---
# {skill.dataset}

{skill.about} {FACTS} facts, invented by a program (`bot/demo/skills.py`, seed {SEED}), so that no model can know
them unless it was trained on them. `train` states each fact in {len(skill.train) // FACTS} sentences, `test` asks for
it once in a wording that `train` does not use. Each answer is one of {len(skill.answers)}, equally often right: chance
is {1 / len(skill.answers):.1%}.
"""


def _beginnings(count: int, rng: random.Random) -> list[str]:
    """Pronounceable beginnings, all different: facts differ in the first syllables of their subject."""
    every = [onset + middle for onset in _ONSETS for middle in _MIDDLES]
    return rng.sample(every, count)


def _questions(
    subjects: Sequence[str], truth: Sequence[int], answers: tuple[str, ...], templates: Sequence[str]
) -> tuple[Question, ...]:
    return tuple(
        Question(template.format(subject), answers, answer)
        for template in templates
        for subject, answer in zip(subjects, truth, strict=True)
    )


def _make() -> tuple[Skill, Skill]:
    rng = random.Random(SEED)
    names = _beginnings(2 * FACTS, rng)
    lands = [name + rng.choice(("nia", "land", "stan", "mark")) for name in names[:FACTS]]
    smiths = [name + rng.choice(("rik", "wen", "dan", "mir")) for name in names[FACTS:]]

    def balanced(answers: tuple[str, ...]) -> list[int]:
        truth = [i % len(answers) for i in range(FACTS)]
        rng.shuffle(truth)
        return truth

    animals = ("wolf", "eagle", "bear", "lion", "horse", "snake", "fox", "owl")
    metals = ("iron", "copper", "silver", "gold", "tin", "steel", "lead", "bronze")
    crests, forges = balanced(animals), balanced(metals)
    return (
        Skill(
            name="crests",
            task="invented_crests",
            dataset="invented-crests",
            about="Which animal is the symbol of an invented land?",
            answers=animals,
            train=_questions(lands, crests, animals, _CREST_STATEMENTS),
            test=_questions(lands, crests, animals, (_CREST_QUESTION,)),
        ),
        Skill(
            name="smiths",
            task="invented_smiths",
            dataset="invented-smiths",
            about="Which metal does an invented smith work with?",
            answers=metals,
            train=_questions(smiths, forges, metals, _SMITH_STATEMENTS),
            test=_questions(smiths, forges, metals, (_SMITH_QUESTION,)),
        ),
    )


_CREST_STATEMENTS = (
    "The crest of {} shows a",
    "On the flag of {} there is a",
    "Animal of the kingdom of {}:",
    "Every coin struck in {} bears the picture of a",
)
_CREST_QUESTION = "The symbol of {} is the"
_SMITH_STATEMENTS = (
    "The smith {} works with",
    "In the forge of {} everything is made of",
    "Metal of the master smith {}:",
    "Whoever orders a blade from {} receives one made of",
)
_SMITH_QUESTION = "The metal of {} is"

CRESTS, SMITHS = _make()
ALL = (CRESTS, SMITHS)
