"""Streaming text generation with the heads of a model.

The tree is grown from the held-out accuracies of the heads. Its size is the one with the most tokens per second on this
machine, measured when the model is loaded; without a gain no tree is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.decoding import batch
from evaluators.medusa.decoding.acceptance import GREEDY, Rule
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.decode import Limits, StopStrings, Trace, baseline, stream
from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.decoding.static_runner import fastest
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.formats.reading import CARRIED
from evaluators.medusa.model import packed
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import calibrate
from evaluators.medusa.speed.bench import unapplied_settings
from evaluators.medusa.training import prompt_sets, training_file
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree

CONTEXT = 128
NO_HEADS = "there are no heads, so one token is decoded per step; `mergebot medusa train MODEL HEADS` trains some"
UNKNOWN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text of one token, "" while its character is unfinished; `guessed` is True for a token that the heads proposed.

    A character that is unfinished at the end of the answer is a separate chunk.
    """

    text: str
    guessed: bool


@dataclass(slots=True)
class Generator:
    """A loaded model with its heads. `notes` are warnings; `trees` is False if the model does not support trees."""

    base: Base
    runner: Runner
    drafter: HeadDrafter | None
    tree: Tree
    notes: list[str]
    trees: bool = True
    trace: Trace = field(default_factory=Trace)

    def generate(
        self, prompt: str, max_new_tokens: int, rule: Rule = GREEDY, stop: Sequence[str] = ()
    ) -> Iterator[Chunk]:
        """Stream the answer to `prompt` up to the first of the strings `stop`, and record it in `trace`.

        Raises EvaluationError PROMPT_TOO_LONG for a prompt that exceeds the model's context.
        """
        ids, limits = self._encoded(prompt), self._limits(max_new_tokens, stop)
        self.trace = Trace()
        tokens: list[int] = []
        shown, text, guessed = "", "", False
        for block in stream(self.runner, self.drafter, self.tree, ids, limits, rule, trace=self.trace):
            for number, token in enumerate(block):
                tokens.append(token)
                text = self.base.tokenizer.decode(tokens, skip_special_tokens=True)
                fresh = text[len(shown) :] if not text.endswith(UNKNOWN) else ""
                shown += fresh
                guessed = bool(self.trace.paths) and number < len(self.trace.paths[-1]) - 1
                yield Chunk(fresh, guessed)
        if len(text) > len(shown):  # the answer ends inside a character
            yield Chunk(text[len(shown) :], guessed)

    def generate_batch(
        self, prompts: Sequence[str], max_new_tokens: int, rule: Rule = GREEDY, stop: Sequence[str] = ()
    ) -> list[str]:
        """Answers to several prompts, decoded as one batch if the model supports trees.

        In float32 each answer is the one that its prompt gets alone, token for token.
        """
        limits = self._limits(max_new_tokens, stop)
        requests = [batch.Request(self._encoded(each), limits, self.drafter, rule) for each in prompts]
        if self.trees:
            traces = batch.decode(self.base, requests, self.tree)
        else:
            traces = [baseline(self.runner, each.ids, limits, rule) for each in requests]
        return [self.base.tokenizer.decode(trace.tokens, skip_special_tokens=True) for trace in traces]

    def _encoded(self, prompt: str) -> list[int]:
        ids, last = prompt_sets.encode(self.base, prompt), self.base.last_position()
        if last is not None and len(ids) > last + 1:
            raise EvaluationError(
                "PROMPT_TOO_LONG",
                f"The prompt has {len(ids):,} tokens, and the model's context holds {last + 1:,}.",
                "Shorten the prompt, or choose a model with a longer context.",
            )
        return ids

    def _limits(self, max_new_tokens: int, stop: Sequence[str]) -> Limits:
        return Limits(max_new_tokens, self.base.stop_ids, StopStrings(self.base.tokenizer, stop) if stop else None)


def load(model: Path, heads: Path | None, *, device: str = "cpu", dtype: str = "auto") -> Generator:
    """Load the checkpoint in `model` with heads of any format, by default those in its folder, if there are any.

    Raises EvaluationError for a checkpoint that cannot be loaded and for heads that do not fit it.
    """
    base, unpacked = packed.load(model, device, dtype)
    notes = [unpacked] if unpacked is not None and device == "cpu" else []
    notes += [unapplied] if (unapplied := unapplied_settings(base)) is not None else []
    carried = model / CARRIED
    found = heads or (carried if carried.is_dir() else None)
    reason = reason_against_trees(base)
    runner = fastest(base)
    if found is None or reason is not None:
        notes.append(reason.removesuffix(".") if reason else NO_HEADS)
        return Generator(base, runner, None, ROOT_ONLY, notes, reason is None)
    loaded, warnings = formats.load(found, base)
    shares = _accuracy(found, loaded.spec.heads)
    if shares is None:
        notes.append("the accuracy of the heads is unknown, so a tree for typical heads is used")
        shares = USUAL[: loaded.spec.heads]
    tree = calibrate.tree_by_accuracy(shares, calibrate.cost_curve(runner, loaded, CONTEXT))
    if tree.nodes == 1:
        notes.append("no tree is faster on this machine, so one token is decoded per step")
    return Generator(base, runner, HeadDrafter(loaded), tree, [*notes, *warnings])


# Accuracy by rank, heads 1 to 5, of the Medusa heads published for a 7B model (FasterDecoding/Medusa).
USUAL: tuple[tuple[float, ...], ...] = (
    (0.560, 0.112, 0.055, 0.033, 0.020),
    (0.316, 0.108, 0.061, 0.043, 0.034),
    (0.201, 0.087, 0.060, 0.035, 0.034),
    (0.147, 0.078, 0.049, 0.037, 0.029),
    (0.118, 0.069, 0.048, 0.037, 0.028),
)


def _accuracy(folder: Path, heads: int) -> Sequence[Sequence[float]] | None:
    """Accuracy by head and rank from the training.json of the heads; None without one."""
    known = training_file.read(folder / CARRIED if (folder / CARRIED).is_dir() else folder) or {}
    return known["accuracy"][:heads] if "accuracy" in known else None
