"""Remarks on the settings of each model's evaluation, as sentences for screen, card and page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from evaluators.comparison.report import joined, short
from evaluators.harness.scores import Loaded, ModelEvaluation

Show = Callable[[str], str]


def remarks(models: Mapping[str, ModelEvaluation], show: Show = short, escape: Show = str) -> list[str]:
    """Peculiarities of single models, then differences in their own settings.

    `show` writes a model's name; `escape` escapes words from a model's files.
    """
    by_clause: dict[str, list[str]] = {}
    for name, evaluation in models.items():
        for clause in _peculiar(evaluation):
            by_clause.setdefault(clause, []).append(show(name))
    peculiarities = [f"{joined(names)}: {escape(clause)}." for clause, names in by_clause.items()]
    loaded = {show(name): each.loaded for name, each in models.items() if each.loaded is not None}
    return [*peculiarities, *_own_settings(loaded, escape)]


def _peculiar(evaluation: ModelEvaluation) -> Iterator[str]:
    for cut in evaluation.cut:
        yield (
            f"{cut.requests} of {cut.of} prompts of {cut.task} were cut at their start, the longest from {cut.longest} "
            f"to {cut.limit} tokens"
        )
    loaded = evaluation.loaded
    if loaded is None:
        return
    if loaded.kept_apart:
        yield (
            f"config.json ties {joined(loaded.kept_apart)}, the files hold other values, and these were measured, as "
            "transformers loads them"
        )
    if loaded.ignored_settings:
        yield f"generation_config.json sets {joined(loaded.ignored_settings)}, which was not applied"
    if loaded.dropped_end:
        yield f"the tokenizer appends {' '.join(loaded.dropped_end)} to every text, which was left out"


def _own_settings(models: Mapping[str, Loaded], escape: Show) -> Iterator[str]:
    """Settings of single models that may change their answers, if they differ."""
    for title, values in (
        ("Written answers end at different tokens", [joined([*map(str, m.ends)] or ["none"]) for m in models.values()]),
        ("Texts begin with different tokens", [" ".join(m.begins_with) or "none" for m in models.values()]),
        ("Texts end with different tokens", [" ".join(m.ends_with) or "none" for m in models.values()]),
        ("Whole texts are scored after different tokens", [" ".join(m.before_whole) for m in models.values()]),
        ("The same text is split into different tokens", [f"tokens {m.splits}" for m in models.values()]),
        ("Decoders start with different tokens", [joined([*map(str, m.starts)] or ["none"]) for m in models.values()]),
        ("Longest input", [f"{m.context} tokens" for m in models.values()]),
        ("Implementation of attention", [m.attention for m in models.values()]),
        ("Spaces before punctuation in answers", ["left out" if m.cleans_spaces else "kept" for m in models.values()]),
    ):
        names: dict[str, list[str]] = {}
        for name, value in zip(models, values, strict=True):
            names.setdefault(value, []).append(name)
        if len(names) > 1:
            values_text = "; ".join(f"{escape(value)} for {joined(each)}" for value, each in names.items())
            yield f"{title}: {values_text}."
