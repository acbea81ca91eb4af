"""`mergebot medusa train`: the evaluator's training with the bot's settings, cache and errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.errors import Refused
from bot.evaluator_errors import translated
from bot.progress import Show
from bot.settings import Settings

if TYPE_CHECKING:
    from evaluators.medusa.decoding.acceptance import Rule
    from evaluators.medusa.training.head_training import Wanted

CHANGES_THE_MODEL = (
    "Joint training changed the model: these heads fit only the base with the adapter in {folder} applied, "
    "whose answers differ from the base's."
)


def train(model: Path, out: Path, wanted: Wanted, settings: Settings, report: Show) -> dict[str, Any]:
    """Train heads for the model in a folder; answers and rows are kept under the home's cache. Raises Refused
    OUTPUT_EXISTS where heads are already, Failed as the evaluator does."""
    from bot.merge.execution.engine import choose_device
    from evaluators.medusa.formats import WEIGHTS
    from evaluators.medusa.training import head_training

    if (out / WEIGHTS).exists():
        raise Refused("OUTPUT_EXISTS", f"{out} holds Medusa heads already.", "Name another folder.", value=str(out))
    with translated():
        return head_training.train_heads(
            model,
            out,
            settings.home / "cache" / "medusa",
            wanted,
            device=choose_device(settings.device).type,
            progress=lambda stage, done, total: report(f"Training heads: {stage}", done, total),
        )


def vocabulary(text: str) -> int | None:
    """`full` (None) or how many tokens the heads may propose. Raises Refused VALUE_OUT_OF_RANGE."""
    if text == "full":
        return None
    if not text.isascii() or not text.isdigit() or not 2 <= int(text) < 2**31:
        raise Refused(
            "VALUE_OUT_OF_RANGE", f"--vocab {text[:40]!r} is neither `full` nor a number of tokens from 2.",
            "Write one such as 8192.", value=text,
        )  # fmt: skip
    return int(text)


def precision(text: str) -> str:
    """`auto` or a floating-point type. Raises Refused VALUE_OUT_OF_RANGE."""
    if text not in ("auto", "float32", "bfloat16", "float16"):
        raise Refused(
            "VALUE_OUT_OF_RANGE", f"No model is run in {text[:40]!r}.", "Choose auto, float32, bfloat16 or float16.",
            value=text,
        )  # fmt: skip
    return text


def rule(name: str, temperature: float, seed: int) -> Rule:
    """The way tokens are accepted. Raises Refused VALUE_OUT_OF_RANGE."""
    from evaluators.medusa.decoding.acceptance import GREEDY, Exact, Typical

    known: dict[str, Rule] = {"greedy": GREEDY, "typical": Typical(temperature), "exact": Exact(seed, temperature)}
    if name not in known:
        raise Refused(
            "VALUE_OUT_OF_RANGE", f"There is no way of sampling {name[:40]!r}.", "Choose greedy, exact or typical.",
            value=name,
        )  # fmt: skip
    return known[name]


def told(facts: dict[str, Any], out: Path) -> list[str]:
    """What came of a training, a sentence each."""
    held_out, spent = facts["held_out"], facts["seconds"]
    said = [
        f"Heads in {out}: {facts['steps']} steps over {facts['positions']} positions of {facts['prompts']} answers in "
        f"{spent['total']:.0f} s, of which {facts['generate_s']:.0f} s went into answers."
    ]
    if held_out["best"] is not None:
        said.append(
            f"{held_out['best']:.2f} tokens per step on {held_out['answers']} held-out answers with a tree of "
            f"{held_out['nodes']} ({held_out['untrained']:.2f} untrained); the draft vocabulary covers "
            f"{facts['coverage']:.1%} of them."
        )
    if facts["dropped_prompts"]:
        said.append(f"{len(facts['dropped_prompts'])} prompts were left out: too close to a test or held-out prompt.")
    if "joint" in facts:
        made = facts["joint"]
        said.append(CHANGES_THE_MODEL.format(folder=out / "adapter"))
        said.append(f"Its choice is the base's at {made['same_choice']:.1%} of positions (KL {made['kl']:.4f} nats).")
    return said
