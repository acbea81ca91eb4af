"""Do Medusa heads survive a merge? The demo's family, several recipes, every way of getting heads for the merge.

usage: python -m benchmarks.heads_and_merges [--cache DIR] [--prompts FILE] [--only RECIPE ...] [--timed-s SECONDS]

Trains heads on both parents, merges parents and heads by each recipe, trains heads on the merge with the same budget,
and compares them all on the merge's own text: accuracy, tokens per step, and the speed they come to with the cost of a
forward pass measured here. Then it runs the whole speed test on the demo's merge (task arithmetic). Writes
benchmarks/heads_and_merges.json after every recipe; tables go to standard output. About half an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bot.demo import base as base_model
from bot.demo import parents, skills
from bot.errors import EvaluationError
from bot.merge.recipe import reading
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.stages import merged_heads
from evaluators import medusa, repetition
from evaluators.medusa import formats
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.heads import Heads, HeadSpec, identity_heads, vocabulary_cut
from evaluators.medusa.model import causal_lm, packed
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import calibrate, transfer
from evaluators.medusa.training import distillation, prompt_sets, simulation, train, training_file
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree

HERE = Path(__file__).resolve().parent
OUT = HERE / "heads_and_merges.json"
CRESTS, SMITHS = "mergebot/smollm2-135m-crests", "mergebot/smollm2-135m-smiths"
TRAINED_ON, CALIBRATED_ON, TESTED_ON = 192, 32, 30
TRAIN_TOKENS, TEST_TOKENS = 96, 48
LONGEST_PROMPT = 160
HEADS, KEPT = 3, 8192
FULL = train.QUICK
SHORT = replace(train.QUICK, learning_rate=1e-3, epochs=1)
WIDTHS = (1, 2, 4, 6, 8, 12, 16)
TIMED = 15
LEAST_TO_RETAIN = 0.02
TIMED_MERGE, TIMED_QUESTIONS, TIMED_TOKENS = "task_arithmetic", 16, 48

_TWO = f"models: [{{model: {CRESTS}, parameters: {{weight: %s}}}}, {{model: {SMITHS}, parameters: {{weight: %s}}}}]"
_BASE = f"base_model: {base_model.REPO}"
RECIPES = {
    "task_arithmetic": f"{{merge_method: task_arithmetic, {_BASE}, {_TWO % (1.0, 1.0)}, dtype: bfloat16}}",
    "slerp": f"{{merge_method: slerp, base_model: {CRESTS}, models: [{{model: {SMITHS}}}], parameters: {{t: 0.5}}, "
    "dtype: bfloat16}",
    "ties": f"{{merge_method: ties, {_BASE}, parameters: {{density: 0.5, normalize: false}}, {_TWO % (1.0, 1.0)}, "
    "dtype: bfloat16}",
    "depth up-scaling": "{merge_method: passthrough, dtype: bfloat16, slices: ["
    f"{{sources: [{{model: {CRESTS}, layer_range: [0, 20]}}]}}, "
    f"{{sources: [{{model: {SMITHS}, layer_range: [10, 30]}}]}}]}}",
    "dare_linear": f"{{merge_method: dare_linear, {_BASE}, parameters: {{density: 0.5}}, {_TWO % (1.0, 1.0)}, "
    "dtype: bfloat16}",
    "linear gradient": "{merge_method: linear, " + _TWO % ("[1.0, 0.5, 0.0]", "[0.0, 0.5, 1.0]") + ", dtype: bfloat16}",
}


@dataclass(frozen=True, slots=True)
class Texts:
    """A model's own greedy answers, by what they are for."""

    train: list[distillation.Dialogue]
    calibration: list[distillation.Dialogue]
    test: list[distillation.Dialogue]


@dataclass(frozen=True, slots=True)
class Prompts:
    train: list[prompt_sets.Prompt]
    calibration: list[prompt_sets.Prompt]
    test: list[prompt_sets.Prompt]


def main() -> int:
    asked = _options()
    console = Console(highlight=False, width=120)
    cache: Path = asked.cache.resolve()
    models = _family(cache / "family", console)
    prompts = _prompts(asked.prompts)
    out: dict[str, Any] = {"settings": _settings(asked.prompts, prompts), "parents": {}, "merges": {}}
    heads = {}
    for name in (CRESTS, SMITHS):
        folder = cache / "heads" / name.partition("/")[2]
        out["parents"][name] = _at_home(models[name], folder, prompts, console)
        heads[ModelRef(name)] = folder
    family = Family(models, heads, prompts)
    for name in asked.only or RECIPES:
        console.print(f"{name}: merging, answers, fresh heads")
        recipe, plain_name = reading.parse(RECIPES[name]), name.replace(" ", "-")
        merged = _merge(recipe, models, cache / "merges" / plain_name)
        out["merges"][name] = _compare(recipe, merged, cache / "heads" / f"merged-{plain_name}", family)
        OUT.write_text(json.dumps(out, indent=1) + "\n")
        console.print(_table(name, out["merges"][name]), soft_wrap=True)
    if asked.timed_s:
        console.print(f"{TIMED_MERGE}: the speed test")
        out["timed"] = _time(family, cache, asked.prompts, asked.timed_s)
        OUT.write_text(json.dumps(out, indent=1) + "\n")
        console.print(out["timed"]["sentence"], soft_wrap=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways of getting Medusa heads for a merge.")
    parser.add_argument("--cache", type=Path, default=Path("heads-and-merges"), help="folder for models and heads")
    parser.add_argument("--prompts", type=Path, help="test questions, JSON lines as in MT-bench; default: built in")
    parser.add_argument("--only", nargs="*", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--timed-s", type=float, default=420.0, help="seconds for the speed test; 0 leaves it out")
    return parser.parse_args()


def _family(folder: Path, console: Console) -> dict[str, Path]:
    """The demo's base and parents by repo name, made where they are missing."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    console.print("the family: base and two parents")
    found = {base_model.REPO: base_model.build(folder)}
    for skill in skills.ALL:
        name = f"mergebot/smollm2-135m-{skill.name}"
        found[name] = parents.train(found[base_model.REPO], skill, folder / name.partition("/")[2])
    return found


def _prompts(given: Path | None) -> Prompts:
    test = prompt_sets.builtin("test") if given is None else prompt_sets.read(given)
    learnt, _ = prompt_sets.without_leaks(prompt_sets.builtin("train"), test)
    held_out, _ = prompt_sets.without_leaks(prompt_sets.builtin("calibration"), test)
    return Prompts(learnt[:TRAINED_ON], held_out[:CALIBRATED_ON], prompt_sets.in_turns(test, len(test)))


def _settings(given: Path | None, prompts: Prompts) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "test": "built-in" if given is None else given.name,
        "prompts": {"train": len(prompts.train), "calibration": len(prompts.calibration), "test": TESTED_ON},
        "tokens": {"train": TRAIN_TOKENS, "test": TEST_TOKENS},
        "heads": {"kind": "shared, conditioned", "count": HEADS, "kept_vocab": KEPT},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 2),
        "seed": 0,
    }


# -- one model ---------------------------------------------------------------------------------------------------------


def _answers(base: Base, prompts: Prompts) -> Texts:
    """Greedy answers for training, and for calibration and test, the latter without prompts that pad their batch."""
    learnt = [prompt_sets.encode(base, prompt.turns[0]) for prompt in prompts.train]
    held_out = [prompt_sets.encode(base, prompt.turns[0]) for prompt in prompts.calibration]
    asked = [ids for prompt in prompts.test if len(ids := prompt_sets.encode(base, prompt.turns[0])) <= LONGEST_PROMPT]
    first = distillation.self_distil(base, learnt, max_new_tokens=TRAIN_TOKENS)
    second = distillation.self_distil(base, held_out + asked[:TESTED_ON], max_new_tokens=TEST_TOKENS)
    distillation.check(base, first)
    return Texts(first, second[:CALIBRATED_ON], second[CALIBRATED_ON:])


def _fit(base: Base, texts: Texts, recipe: train.Recipe, initial: Heads | None = None) -> tuple[Heads, train.Training]:
    learnt, held_out = (
        distillation.stack_features(base, texts.train),
        distillation.stack_features(base, texts.calibration),
    )
    keep = vocabulary_cut(learnt.tokens.tolist(), KEPT, base)
    spec = HeadSpec("shared", HEADS, 1, conditioned=True, keep=keep) if initial is None else initial.spec
    return train.fit(spec, base, learnt, train.TrainingOptions(recipe, 3600), held_out=held_out, initial=initial)


def _at_home(model: Path, folder: Path, prompts: Prompts, console: Console) -> dict[str, Any]:
    """Train heads on a parent and see what they are worth on that parent's own text."""
    console.print(f"heads for {model.name}")
    began = time.monotonic()
    base = packed.load(model)[0]
    texts = _answers(base, prompts)
    heads, training = _fit(base, texts, FULL)
    formats.save(heads, folder, base_model=model.name)
    formats.write_json(folder / training_file.NAME, {"positions": training.positions, "steps": training.steps})
    calibration, test = (
        distillation.stack_features(base, texts.calibration),
        distillation.stack_features(base, texts.test),
    )
    common = transfer.common_tree(heads, calibration)
    return _row(heads, calibration, test, common, None) | {
        "positions": training.positions,
        "steps": training.steps,
        "fit_s": round(training.seconds, 1),
        "all_s": round(time.monotonic() - began, 1),
    }


# -- one merge ---------------------------------------------------------------------------------------------------------


def _merge(recipe: Recipe, models: Mapping[str, Path], out: Path) -> Path:
    from bot.merge.checkpoints.checkpoint import LocalFiles
    from bot.merge.checkpoints.lora import open_source
    from bot.merge.execution import stages
    from bot.merge.planning import planner

    if not out.is_dir():
        folders = {ref: models[ref.path] for ref in recipe.repos}
        made = planner.make(recipe, {ref: open_source(LocalFiles(folder)) for ref, folder in folders.items()})
        out.parent.mkdir(parents=True, exist_ok=True)
        stages.merge(made, folders, out)
    return out


@dataclass(frozen=True, slots=True)
class Family:
    """What stays the same from merge to merge: models by repo, the parents' heads, the prompts."""

    models: Mapping[str, Path]
    heads: Mapping[ModelRef, Path]
    prompts: Prompts


def retention(top1: Sequence[float], untrained: Sequence[float], reference: Sequence[float]) -> list[float | None]:
    """Share per head of the gain from training on this model that a set has: (acc - floor) / (fresh - floor).

    None where training gained less than 0.02, which would divide by noise. Sets of unequal size are compared as far as
    both go.
    """
    kept: list[float | None] = []
    for mine, floor, best in zip(top1, untrained, reference, strict=False):
        gained = best - floor
        kept.append(None if gained < LEAST_TO_RETAIN else (mine - floor) / gained)
    return kept


def hidden_cosine(model: Path, base: Base, texts: Sequence[distillation.Dialogue]) -> float | None:
    """Mean cosine between the hidden rows of another model and of `base` on the same tokens, over all output tokens.

    None where the two cannot be compared: other width, other vocabulary, or a model that cannot be loaded.
    """
    import torch
    from torch.nn import functional as F

    try:
        other = causal_lm.load(model, str(base.device), base.dtype)
    except EvaluationError:
        return None
    if (other.hidden, other.vocab) != (base.hidden, base.vocab):
        return None
    total, rows = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*text.prompt, *text.output[:-1]]], device=base.device)
        with torch.no_grad():
            hidden, _ = other.run(ids, project=False, use_cache=False)
        theirs = hidden[0, len(text.prompt) - 1 :].float()
        total += float(F.cosine_similarity(theirs, text.hidden.to(theirs), dim=-1).sum())
        rows += len(theirs)
    return total / rows if rows else None


def _compare(recipe: Recipe, merged: Path, heads: Path, family: Family) -> dict[str, Any]:
    """Every set of heads on the merged model's own text; the parents' merged heads are put into `heads`."""
    began = time.monotonic()
    shutil.rmtree(heads, ignore_errors=True)  # of other parents' heads, trained with other settings
    merged_heads.merge(recipe, family.heads, heads)
    base = packed.load(merged)[0]
    texts = _answers(base, family.prompts)
    sets, training = _sets(base, texts, heads, family)
    fresh = sets["fresh"]
    calibration, test = (
        distillation.stack_features(base, texts.calibration),
        distillation.stack_features(base, texts.test),
    )
    cost = calibrate.cost_curve(EagerRunner(base), fresh, 100, widths=WIDTHS, repeats=TIMED)
    common = transfer.common_tree(fresh, calibration)
    rows = {key: _row(each, calibration, test, common, cost) for key, each in sets.items()}
    for row in rows.values():
        row["retention"] = retention(row["top1"], rows["identity"]["top1"], rows["fresh"]["top1"])
    for ref in family.heads:
        rows[f"parent:{ref.path}"]["hidden_cosine"] = hidden_cosine(family.models[ref.path], base, texts.test)
    return {
        "rows": rows,
        "cost": {"clock": cost.clock, "draft_ms": cost.draft_ms, "points": cost.points},
        "training": training,
        "distinct_4grams": [round(repetition.distinct_4grams(text.output), 2) for text in texts.test],
        "test_tokens": len(test.tokens),
        "seconds": round(time.monotonic() - began, 1),
    }


def _sets(base: Base, texts: Texts, heads: Path, family: Family) -> tuple[dict[str, Heads], dict[str, Any]]:
    """Every way of getting heads for this model, and what those that learn here cost."""
    fresh, training = _fit(base, texts, FULL)
    short, short_training = _fit(base, texts, SHORT)
    transferred = formats.load(heads, base)[0]
    tuned, tuning = _fit(base, texts, SHORT, transferred)
    sets = {"identity": identity_heads(fresh.spec, base)}
    sets |= {f"parent:{ref.path}": formats.load(at, base)[0] for ref, at in family.heads.items()}
    sets |= {"merged": transferred, "merged, tuned": tuned, "fresh, as short": short, "fresh": fresh}
    return sets, {
        "positions": training.positions,
        "fresh_steps": training.steps,
        "fresh_s": training.seconds,
        "tuned_steps": tuning.steps,
        "tuned_s": tuning.seconds,
        "short_steps": short_training.steps,
    }


def _time(family: Family, cache: Path, prompts: Path | None, budget_s: float) -> dict[str, Any]:
    """The speed test of the demo's merge with all the heads there are."""
    merged = _merge(reading.parse(RECIPES[TIMED_MERGE]), family.models, cache / "merges" / TIMED_MERGE)
    folder = cache / "heads" / f"merged-{TIMED_MERGE}"
    if not folder.is_dir():
        merged_heads.merge(reading.parse(RECIPES[TIMED_MERGE]), family.heads, folder)
    given = [medusa.Given(f"parent:{ref.path}", "parent", heads) for ref, heads in family.heads.items()]
    return medusa.measure(
        merged,
        cache / "timed",
        medusa.SpeedOptions(
            prompts=prompts,
            budget_s=budget_s,
            questions=TIMED_QUESTIONS,
            max_new_tokens=TIMED_TOKENS,
            given=[*given, medusa.Given("merged", "merged", folder)],
        ),
    )


def _row(
    heads: Heads,
    calibration: distillation.Features,
    test: distillation.Features,
    common: Tree,
    cost: calibrate.CostCurve | None,
) -> dict[str, Any]:
    right = simulation.accuracy(heads, test)
    trees = [common.shallow(heads.spec.heads), transfer.common_tree(heads, calibration)]
    at_common, at_own = simulation.simulate_each(heads, test, trees)
    row: dict[str, Any] = {
        "top1": [round(shares[0], 4) for shares in right.shares],
        "top5": [round(sum(shares[:5]), 4) for shares in right.shares],
        "positions": right.positions,
        "common_8": at_common,
        "own_8": at_own,
        "hidden_cosine": None,
    }
    if cost is not None:
        choice = calibrate.choose_tree(heads, calibration, cost)
        tree = choice.tree if choice.speculate else ROOT_ONLY
        row["best_nodes"] = tree.nodes
        row["best_rate"] = simulation.simulate(heads, test, choice.tree)
        row["predicted_speed"] = row["best_rate"] / choice.overhead
        row["tried_nodes"] = choice.tree.nodes
    return row


def _table(name: str, merge: Mapping[str, Any]) -> str:
    lines = [
        f"\n**{name}**\n",
        "| heads | top-1, heads 1-3 | retention | tokens/step, common tree | own tree of 8 | cosine | predicted |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for key, row in merge["rows"].items():
        lines.append(
            f"| {key} | {_list(row['top1'])} | {_list(row['retention'])} | {row['common_8']:.3f} | {row['own_8']:.3f} "
            f"| {'' if row['hidden_cosine'] is None else format(row['hidden_cosine'], '.3f')} "
            f"| {row['predicted_speed']:.2f} ({row['tried_nodes']} nodes) |"
        )
    return "\n".join(lines)


def _list(values: Sequence[float | None]) -> str:
    return " ".join("–" if value is None else f"{value:.2f}" for value in values)


if __name__ == "__main__":
    raise SystemExit(main())
