"""File formats of heads: read published checkpoints, and write those that serving programs load.

    medusa_lm_head.safetensors   {i}.{j}.linear.weight / .bias   block j of head i
                                 {i}.{L}.weight                  own projection of head i (V1)
                                 keep                            token ids of a reduced draft vocabulary (ours)
    config.json                  medusa_num_heads, medusa_num_layers, base_model_name_or_path, version,
                                 mergebot_heads: {kind, conditioned, keep}, mergebot_tree: [paths]

    model.safetensors (vLLM)     blocks.{i}.layers.{j}.weight / .bias, lm_heads.{i}.weight, token_map

`reading` opens files, `layout` derives the heads from keys and shapes, `writing` writes files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bot.errors import EvaluationError
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.formats import reading
from evaluators.medusa.formats.layout import HeadLayout, examine
from evaluators.medusa.formats.reading import WEIGHTS
from evaluators.medusa.formats.writing import CONFIG, FORMATS, Format, block, formats_of, save, write_json
from evaluators.medusa.model import causal_lm
from evaluators.medusa.model.causal_lm import Base

__all__ = ["CONFIG", "FORMATS", "WEIGHTS", "Format", "block", "export", "formats_of", "load", "save", "write_json"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(folder: Path, base: Base) -> tuple[Heads, list[str]]:
    """Read heads of any format for `base`. Returns (heads, warnings).

    Raises EvaluationError BAD_HEADS for a file that is broken or does not fit.
    """
    stored = reading.find(folder)
    config = reading.config(stored.folder)
    layout = examine(stored, config, base)
    ours, spec = config.get("mergebot_heads"), layout.spec
    copies = spec.kind == "own" and isinstance(ours, dict) and ours.get("kind") == "shared"
    if copies and all(_is_of_base(layout, head, base) for head in range(spec.heads)):
        # Exported with copies of the output embedding, because the format has no shared projection.
        spec = HeadSpec("shared", spec.heads, spec.layers)
        layout = replace(layout, spec=spec, projections={})
    heads = Heads(spec, base)
    with torch.no_grad():
        for head in range(spec.heads):
            for index in range(spec.layers):
                weight, bias = block(heads, head, index)
                weight.copy_(layout.read(layout.weights[head, index]))
                if (head, index) in layout.biases:
                    bias.copy_(layout.read(layout.biases[head, index]))
            if spec.kind == "own":
                heads.unembed[head].copy_(layout.projection(head))
    warnings = [*layout.warnings, *_equal_blocks(heads)]
    if spec.kind == "shared" and layout.projections and not _is_of_base(layout, 0, base):
        warnings.append("the output embedding in the head file is not that of this model: the model's own is used")
    return heads.eval().requires_grad_(False), warnings


def export(
    source: Path, out: Path, fmt: str, model: Path, *, base_model: str = "", dtype: str = "float32"
) -> list[str]:
    """Convert heads of any format in `source` to format `fmt` in `out`, checked against the checkpoint in `model`.

    Returns notes for the user. Raises EvaluationError.
    """
    known = next((known for known in FORMATS if known == fmt), None)
    if known is None or dtype not in DTYPES:
        names = f"format `{fmt[:40]}`" if known is None else f"type `{dtype[:40]}`"
        choice = FORMATS if known is None else tuple(DTYPES)
        raise EvaluationError(
            "HEADS_UNSUPPORTED", f"Heads cannot be exported to {names}.", f"Choose one of {', '.join(choice)}."
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise EvaluationError("OUTPUT_EXISTS", f"{out} exists and is not empty.", "Choose a new folder.")
    base = causal_lm.load(model)
    heads, warnings = load(source, base)
    return [*warnings, *save(heads, out, known, base_model=base_model, dtype=DTYPES[dtype])]


def _is_of_base(layout: HeadLayout, head: int, base: Base) -> bool:
    """Return True if the stored projection is the base's output embedding, in the precision of either."""
    rows: Tensor = base.output.weight.detach().cpu()
    if layout.spec.keep is not None:
        rows = rows[list(layout.spec.keep)]
    found, dtype = layout.projection(head), layout.stored.dtypes[layout.projections[head]]
    return bool(torch.equal(found, rows.to(dtype).float()) or torch.equal(found.to(rows.dtype), rows))


def _equal_blocks(heads: Heads) -> list[str]:
    """Warning for equal blocks of one head: the reference tied them by multiplying a list. Here they are separate."""
    for head in range(heads.spec.heads):
        first, *others = (block(heads, head, index) for index in range(heads.spec.layers))
        for weight, bias in others:
            if bool(first[0].any()) and torch.equal(first[0], weight) and torch.equal(first[1], bias):
                return [f"the {heads.spec.layers} blocks of head {head} are equal: they are loaded as separate blocks"]
    return []
