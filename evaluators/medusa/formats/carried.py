"""Heads inside a model's repo: `medusa/` for the heads, `custom_generate/` for transformers' `generate`."""

from __future__ import annotations

import shutil
from pathlib import Path

from evaluators.medusa import custom_generate
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.formats.reading import CARRIED
from evaluators.medusa.formats.writing import save
from evaluators.medusa.trees.tree import Tree

GENERATE = "custom_generate/generate.py"


def carry(heads: Heads, repo: Path, *, base_model: str = "", tree: Tree | None = None) -> None:
    """Put the heads into the folder of their model, with the code that `custom_generate` runs."""
    save(heads, repo / CARRIED, base_model=base_model, tree=tree)
    put_code(repo)


def put_code(repo: Path) -> None:
    """The code that `model.generate(custom_generate=...)` looks for; it reads `medusa/` of the same repo."""
    target = repo / GENERATE
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(custom_generate.__file__), target)
