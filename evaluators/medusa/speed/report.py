"""Description of model and machine in the speed report, and the report as one paragraph."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from bot.storage import sha256_file
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.conclusions import DO_NOT, hardly_trained
from evaluators.medusa.speed.document import Environment, Model
from evaluators.pictures.speed_figure import way_of

VERDICTS = {
    "faster": "decoding with them is faster here",
    "slower": "decoding with them is slower here",
    "same": "the difference to baseline decoding is within the noise",
    "inconclusive": "the machine was too unsteady, or the questions too few, for a verdict",
}


def describe_model(base: Base, folder: Path) -> Model:
    """Describe the checkpoint in `folder` as loaded."""
    config = base.config
    return Model(
        weights_sha256=weights_sha256(folder),
        architecture=type(base.model).__name__,
        parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        layers=getattr(config, "num_hidden_layers", None),
        hidden_size=base.hidden,
        vocab_size=base.vocab,
        dtype=str(base.dtype).removeprefix("torch."),
    )


def describe_environment(base: Base, kernel: str | None, seed: int) -> Environment:
    """Describe the machine and the execution of the base on it."""
    return Environment(
        device=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else str(base.device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        attention=kernel,
        execution=base.execution,
        load_before=load(),
        seed=seed,
    )


def load() -> float | None:
    """One-minute load average, this process included; None if the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of the weights: of the single safetensors file, or of the lines `sha256  name` of several."""
    digests = [(path.name, sha256_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    if len(digests) <= 1:
        return digests[0][1] if digests else None
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests).encode()).hexdigest()


def sentence(report: Mapping[str, Any]) -> str:
    """Summarise the report in one paragraph for a model card. A speedup below 1 is stated first."""
    if report["refusal"]:
        return f"Decode speed with Medusa heads was not measured: {report['refusal']}"
    fresh = [row for row in report["candidates"] if row["origin"] == "fresh"]
    timed = [row for row in fresh if row["tokens_per_step"]["measured"] is not None]
    if not timed:
        reason = next((row["absent_because"] for row in fresh if row["absent_because"]), None)
        reason = reason or "the model stopped at once on every prompt."
        return f"Decode speed with Medusa heads was not measured: {reason}"
    row = next((row for row in timed if row["id"] == report["chosen"]), timed[0])
    others = f" These are the {way_of(row['id'])}, of {len(timed)} sets." if len(timed) > 1 else ""
    speed, machine = row["speedup"], report["environment"]
    clock = speed["clock_used"]
    ratio, interval = speed[clock], speed[f"{clock}_ci95"]
    unit = "x plain speed in CPU time" if clock == "cpu" else "x plain speed"
    span = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else "from one question, no interval"
    exact = row["exact"]
    looping = report["suite"]["looping"]
    flattered = (
        f" {looping} of {exact['prompts']} answers repeat themselves, which flatters this figure." if looping else ""
    )
    advice = " Do not speculate here." if report["recommendation"] == DO_NOT else ""
    return (
        f"{_trained(row['training'])} bring {row['tokens_per_step']['measured']:.2f} tokens per step; "
        f"on {_where(machine)} decoding with them runs at {ratio:.2f} {unit} ({span}): {VERDICTS[speed['verdict']]}."
        f"{others}{flattered}{advice} {_exactness(exact, report['model']['dtype'])}"
        f"{' ' + report['transfer'] if report['transfer'] else ''}"
    )


def _exactness(exact: Mapping[str, Any], dtype: str | None) -> str:
    said = f"Greedy text was equal to baseline decoding on {exact['equal']} of {exact['prompts']} questions"
    ties, unjudged = ({each["prompt"] for each in exact["divergences"] if each["tie"] is tie} for tie in (True, None))
    ties -= unjudged  # one of its runs was not checked
    if ties:
        said += f"; on {len(ties)} it left it where rounding in {dtype} decides between two tokens"
    if unjudged:
        said += f"; on {len(unjudged)} it left it, and whether rounding in {dtype} explains that was not checked"
    return f"{said}."


def _trained(training: Mapping[str, Any]) -> str:
    if training["steps"] is None:
        return "The Medusa heads that were given"
    if not training["steps"]:
        return "Untrained Medusa heads (there was no time, or no text, to train them)"
    seconds = sum(training[key] or 0.0 for key in ("generate_s", "features_s", "fit_s"))
    learnt = f"trained in {seconds:.0f} s on {training['tokens']} tokens of the model's own text"
    if hardly_trained(training):
        steps = "step" if training["steps"] == 1 else "steps"
        return f"Medusa heads that are hardly trained ({training['steps']} {steps}; {learnt}; give it more time)"
    return f"Medusa heads {learnt}"


def _where(machine: Mapping[str, Any]) -> str:
    if machine["device"] != "cpu":
        return str(machine["device"])
    return f"this CPU ({machine['threads']} thread{'s' if machine['threads'] != 1 else ''})"
