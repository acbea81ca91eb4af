"""Transfer test: accuracy on a merged model of its parents' heads, as they are or merged, against fresh ones.

One pass of the merged model over held-out text serves every set of heads: accuracy and tokens per step of a greedy
decoder are arithmetic on its hidden states (simulation.simulate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.calibrate import Choice
from evaluators.medusa.speed.run import Given, Origin
from evaluators.medusa.training import distillation, prompt_sets, simulation, training_file
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees import tree_files
from evaluators.medusa.trees.tree import Tree, greedy_tree

COMMON_NODES = 8
UNEQUAL_TRAINING = 0.1


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Loaded heads, the facts of their training and the tree chosen for them, as far as known."""

    id: str
    origin: Origin
    heads: Heads | None
    source: str | None = None
    absent_because: str | None = None
    training: dict[str, Any] | None = None
    choice: Choice | None = None


def load(given: Sequence[Given], base: Base) -> tuple[list[HeadSet], list[str]]:
    """Load the given sets in order; return them and warnings.

    Parents' and merged heads that do not fit this model are kept with the reason. Raises EvaluationError for others.
    """
    sets: list[HeadSet] = []
    warnings: list[str] = []
    for each in given:
        heads, reason = None, each.absent_because
        if each.folder is not None:
            try:
                heads, notes = formats.load(each.folder, base)
                warnings += [f"{each.id}: {text}" for text in notes]
            except EvaluationError as error:
                if each.origin == "fresh":
                    raise
                reason = error.message
        training = None if each.folder is None else training_file.read(each.folder)
        sets.append(HeadSet(each.id, each.origin, heads, each.source, reason, training))
    return sets, warnings


def filling(sets: Sequence[HeadSet], tree: Tree | None) -> list[HeadSet]:
    """Return the sets; those of parents or merges that are too small for the given tree become a reason.

    Raises EvaluationError for other sets that are too small.
    """
    found = []
    for each in sets:
        reason = None if each.heads is None or tree is None else _too_small(each.heads, tree)
        if reason is not None and each.origin == "fresh":
            raise tree_files.unfit(reason)
        found.append(each if reason is None else replace(each, heads=None, absent_because=reason))
    return found


def _too_small(heads: Heads, tree: Tree) -> str | None:
    spec = heads.spec
    tokens = heads.base.vocab if spec.keep is None else len(spec.keep)
    if tree.max_depth > spec.heads:
        return f"The given tree is {tree.max_depth} levels deep, but there are only {spec.heads} heads to fill it."
    if tree.topk > tokens:
        return f"The given tree asks for the {tree.topk} best guesses of heads that choose among {tokens} tokens."
    return None


def common_tree(heads: Heads, calibration: distillation.Features) -> Tree:
    """Return the tree that all sets are compared with: the best of its size for the reference `heads`."""
    return greedy_tree(simulation.accuracy(heads, calibration).shares, COMMON_NODES)


def unequal_training(sets: Sequence[HeadSet], reference: HeadSet) -> list[str]:
    """Name the parents' sets trained on clearly more or less text than the reference, or on an unknown amount."""
    wanted = (reference.training or {}).get("positions")
    sentences = []
    for each in sets:
        if each.heads is None or each.origin != "parent" or not wanted:
            continue
        positions = (each.training or {}).get("positions")
        if positions is None:
            sentences.append(
                f"nothing says how long the heads of {each.id} were trained, so they may have had another budget"
            )
        elif abs(positions / wanted - 1) > UNEQUAL_TRAINING:
            sentences.append(
                f"the heads of {each.id} learnt from {positions} positions, those of {reference.id} from {wanted}"
            )
    return sentences


def kept_apart(
    test: Sequence[Prompt], given: Sequence[Given], least: int
) -> tuple[list[Prompt], list[str], list[Given]]:
    """Return (questions unseen in training, ids of the others, the given heads), according to the training files.

    The training file of a parent's heads is untrusted: if it would leave fewer than `least` questions, those heads and
    the ones merged from them are left out instead of the questions.
    """
    left, known = prompt_sets.unlearnt(test, learnt_prompts([each for each in given if each.origin == "fresh"]))
    leaking: set[str] = set()
    for each in given:
        rest, seen = prompt_sets.unlearnt(left, learnt_prompts([each]))
        if seen and len(rest) < min(least, len(left)):
            leaking |= {each.id, "merged"}
        else:
            left, known = rest, [*known, *seen]
    absent = "they, or heads they are merged from, were trained on the questions of this test."
    dropped = {each.id for each in given if each.folder and each.origin != "fresh" and each.id in leaking}
    kept = [replace(each, folder=None, absent_because=absent) if each.id in dropped else each for each in given]
    return left, known, kept


def learnt_prompts(given: Sequence[Given]) -> frozenset[str]:
    """Return the prompt fingerprints in the training files of the given heads; none for heads without one."""
    folders = [each.folder for each in given if each.folder is not None]
    return frozenset(print_ for folder in folders for print_ in training_file.learnt_prompts(folder))
