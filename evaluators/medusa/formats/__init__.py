"""Heads on disk: read what others publish, write what others serve.

    medusa_lm_head.safetensors   {i}.{j}.linear.weight / .bias   block j of head i
                                 {i}.{L}.weight                  own projection of head i (V1)
                                 keep                            token ids of a reduced draft vocabulary (ours)
    config.json                  medusa_num_heads, medusa_num_layers, base_model_name_or_path, version,
                                 mergebot_heads: {kind, conditioned, keep}, mergebot_tree: [paths]

    model.safetensors (vLLM)     blocks.{i}.layers.{j}.weight / .bias, lm_heads.{i}.weight, token_map

`reading` opens files, `layout` decides by keys and shapes what they hold, `writing` makes them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bot.errors import EvaluationError
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.formats import reading
from evaluators.medusa.formats.layout import Holding, examine
from evaluators.medusa.formats.reading import WEIGHTS
from evaluators.medusa.formats.writing import CONFIG, FORMATS, Format, block, formats_of, save, write_json
from evaluators.medusa.model import causal_lm
from evaluators.medusa.model.causal_lm import Base

__all__ = ["CONFIG", "FORMATS", "WEIGHTS", "Format", "block", "export", "formats_of", "load", "save", "write_json"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(folder: Path, base: Base) -> tuple[Heads, list[str]]:
    """Read heads of any format for `base`; the second value is warnings, a sentence each.

    Raises EvaluationError BAD_HEADS where the file is broken or does not fit, with the reason.
    """
    stored = reading.find(folder)
    config = reading.config(stored.folder)
    held = examine(stored, config, base)
    ours = config.get("mergebot_heads")
    copies = held.spec.kind == "own" and isinstance(ours, dict) and ours.get("kind") == "shared"
    if copies and all(_is_of_base(held, head, base) for head in range(held.spec.heads)):
        # Exported with copies of the output embedding for a format that knows no other way.
        held = Holding(
            held.stored,
            HeadSpec("shared", held.spec.heads, held.spec.layers),
            held.weights,
            held.biases,
            {},
            held.warnings,
        )
    heads = Heads(held.spec, base)
    with torch.no_grad():
        for head in range(held.spec.heads):
            for index in range(held.spec.layers):
                weight, bias = block(heads, head, index)
                weight.copy_(held.read(held.weights[head, index]))
                if (head, index) in held.biases:
                    bias.copy_(held.read(held.biases[head, index]))
            if held.spec.kind == "own":
                heads.unembed[head].copy_(held.projection(head))
    warnings = [*held.warnings, *_tied(heads)]
    if held.spec.kind == "shared" and held.projections and not _is_of_base(held, 0, base):
        warnings.append("the output embedding in the head file is another model's: this model's own is used")
    return heads.eval().requires_grad_(False), warnings


def export(
    source: Path, out: Path, fmt: str, model: Path, *, base_model: str = "", dtype: str = "float32"
) -> list[str]:
    """Heads in `source`, of any format, -> `out` in format `fmt`, checked against the checkpoint in `model`.

    Returns what a user should know. Raises EvaluationError.
    """
    known = next((known for known in FORMATS if known == fmt), None)
    if known is None or dtype not in DTYPES:
        names = f"format `{fmt[:40]}`" if known is None else f"type `{dtype[:40]}`"
        choice = FORMATS if known is None else tuple(DTYPES)
        raise EvaluationError("HEADS_UNSUPPORTED", f"Heads have no {names}.", f"Choose one of {', '.join(choice)}.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise EvaluationError("OUTPUT_EXISTS", f"{out} is there and not empty.", "Choose a new folder.")
    base = causal_lm.load(model)
    heads, warnings = load(source, base)
    return [*warnings, *save(heads, out, known, base_model=base_model, dtype=DTYPES[dtype])]


def _is_of_base(held: Holding, head: int, base: Base) -> bool:
    """Whether the projection in the file is the base's output embedding, in the file's precision or the base's."""
    rows: Tensor = base.output.weight.detach().cpu()
    if held.spec.keep is not None:
        rows = rows[list(held.spec.keep)]
    found, dtype = held.projection(head), held.stored.dtypes[held.projections[head]]
    return bool(torch.equal(found, rows.to(dtype).float()) or torch.equal(found.to(rows.dtype), rows))


def _tied(heads: Heads) -> list[str]:
    """Blocks of one head that are one: the reference made them so by multiplying a list. Here each is its own."""
    for head in range(heads.spec.heads):
        first, *others = (block(heads, head, index) for index in range(heads.spec.layers))
        for weight, bias in others:
            if bool(first[0].any()) and torch.equal(first[0], weight) and torch.equal(first[1], bias):
                return [f"the {heads.spec.layers} blocks of head {head} are equal: each became a block of its own"]
    return []
