"""`mergebot medusa train`: the evaluator's training with the bot's settings, cache and errors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.errors import Refused
from bot.progress import Show
from bot.settings import Settings
from bot.stages import output_folder
from bot.stages.merged_heads import WEIGHTS

if TYPE_CHECKING:
    from evaluators.medusa.decoding.acceptance import Rule
    from evaluators.medusa.training.head_training import HeadTrainingConfig

SAMPLING = ("greedy", "exact", "typical")
LAYOUTS = ("v1", "v2", "tgi", "vllm", "ours")  # the formats of evaluators.medusa.formats, known without torch
CHANGES_THE_MODEL = (
    "Joint training changed the model: these heads fit only the base with the adapter in {folder} applied, "
    "whose answers differ from the base's."
)


def train(model: Path, out: Path, config: HeadTrainingConfig, settings: Settings, report: Show) -> dict[str, Any]:
    """Train heads for the model in a folder; answers and rows are kept under the home's cache. Raises Refused
    OUTPUT_EXISTS as `require_room`, Failed as the evaluator does."""
    from bot.merge.execution.engine import choose_device
    from evaluators.medusa.training import head_training

    require_room(out)
    return head_training.train_heads(
        model,
        out,
        settings.home / "cache" / "medusa",
        config,
        device=choose_device(settings.device).type,
        progress=lambda stage, done, total: report(f"Training heads: {stage}", done, total),
    )


def require_room(out: Path) -> None:
    """Raises Refused OUTPUT_EXISTS unless `out` is new, empty, or holds a training that was stopped."""
    if (out / WEIGHTS).exists():
        raise Refused("OUTPUT_EXISTS", f"{out} holds Medusa heads already.", "Name a new folder.", value=str(out))
    if not (out / "unfinished").is_dir():
        output_folder.new_folder(out)


def require_readable(prompts: Path | None, other: Path | None, tree: Path | None = None) -> None:
    """Raises Failed for missing or empty files of prompts or of a tree."""
    from evaluators.medusa.training import prompt_sets
    from evaluators.medusa.trees import tree_files

    for file in (prompts, other):
        if file is not None:
            prompt_sets.read(file)
    if tree is not None:
        tree_files.read(tree)


def rule(name: str, temperature: float, seed: int, top_k: int = 0, top_p: float = 1.0) -> Rule:
    """The acceptance rule named in SAMPLING, with the cuts of exact sampling."""
    from evaluators.medusa.decoding.acceptance import GREEDY, Exact, Typical

    if name == "greedy":
        return GREEDY
    return Typical(temperature) if name == "typical" else Exact(seed, temperature, top_k, top_p)


def told(facts: dict[str, Any], model: str, out: Path) -> list[str]:
    """Summary of a training in sentences, with the commands that use the heads."""
    from evaluators.medusa.speed.conclusions import hardly_trained

    held_out, spent = facts["held_out"], facts["seconds"]
    said = [
        f"Heads in {out}: {facts['steps']} steps over {facts['positions']} positions of {facts['prompts']} answers in "
        f"{spent['total']:.0f} s, of which {facts['generate_s']:.0f} s went into answers."
    ]
    if hardly_trained(facts["steps"], facts["tokens"]):
        said.append(
            f"So few steps on {facts['tokens']} tokens leave heads hardly trained, and they will hardly speed anything "
            "up: train again, longer (--budget-s)."
        )
    if held_out["best"] is not None:
        said.append(
            f"{held_out['best']:.2f} tokens per step on {held_out['answers']} held-out answers with a tree of "
            f"{held_out['nodes']} ({held_out['untrained']:.2f} untrained); the draft vocabulary covers "
            f"{facts['coverage']:.1%} of them."
        )
    if facts["dropped_prompts"]:
        said.append(f"{len(facts['dropped_prompts'])} prompts were left out: too close to a test or held-out prompt.")
    if facts["shortened_prompts"]:
        said.append(
            f"{facts['shortened_prompts']} prompts leave too little of the model's context for an answer: heads learnt "
            "from answers to their ends."
        )
    if "joint" in facts:
        made = facts["joint"]
        said.append(CHANGES_THE_MODEL.format(folder=out / "adapter"))
        said.append(f"Its choice is the base's at {made['same_choice']:.1%} of positions (KL {made['kl']:.4f} nats).")
        if made["tokens_per_step"] is not None:
            said.append(f"{made['tokens_per_step']:.2f} tokens per step with the changed model and heads.")
    return [*said, *_next_commands(facts, model, out)]


def _next_commands(facts: dict[str, Any], model: str, out: Path) -> list[str]:
    """Commands that use the heads, as typed in a shell."""
    said, place = ["Next:"], str(out)
    if "joint" in facts:
        changed = f"{place}-model"
        adapted = f"{model}+{out / 'adapter'}"
        words = ("--merge", adapted, "--weight", "1", "--method", "linear", "--no-bf16")
        said.append(_typed("mergebot", "classic", changed, *words))
        model = changed
    said.append(_typed("mergebot", "medusa", "generate", model, "Describe a lighthouse.", "--heads", place))
    said.append(_typed("mergebot", "medusa", "bench", model, "--heads", place))
    layouts = [name for name in LAYOUTS if name in facts["heads"]["formats"] and name != "ours"]
    if layouts:
        export = _typed("mergebot", "medusa", "export", place, f"{place}-{layouts[-1]}", "--model", model)
        said.append(f"{export} --format {layouts[-1]}" + f"   (or {', '.join(layouts[:-1])})" * (len(layouts) > 1))
    else:
        said.append("Only mergebot reads such heads; for TGI or vLLM train with --no-conditioned.")
    return said


def _typed(*words: str) -> str:
    return f"  {shlex.join(words)}"
