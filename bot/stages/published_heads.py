"""Medusa heads in a published repo: the best of the speed test, and the code that generates with them.

medusa/medusa_lm_head.safetensors, config.json, training.json     the heads, and the tree to try
custom_generate/generate.py                                       code that transformers' `custom_generate` runs
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bot.jobs.job import PublishedFile
from bot.stages.head_candidates import CARRIED, LIMIT_BYTES, SMALL_FILES
from bot.stages.merged_heads import WEIGHTS
from bot.storage import sha256_file

# row of the speed report -> where the speed test left its heads
FOLDERS = {"fresh": "heads", "merged": "merged_heads", "merged_tuned": "merged_tuned"}


def carry(measured: Path, speed: Mapping[str, Any], into: Path) -> dict[str, PublishedFile]:
    """Copy the heads for publication into the new folder `into`: the fastest of the test, else the fresh ones.

    `measured` is the folder of the speed test. Returns the files by their names in the repo; empty if no heads were
    trained, the report is refused, or the heads exceed the size limit.
    """
    from evaluators.medusa.formats import write_json
    from evaluators.medusa.formats.writing import write_generate_code
    from evaluators.medusa.speed import conclusions
    from evaluators.medusa.speed.report import Report

    shutil.rmtree(into, ignore_errors=True)
    row = conclusions.carried(Report.from_dict(speed), FOLDERS)
    if row is None or not _fetchable(measured / FOLDERS[row.id] / WEIGHTS):
        return {}
    source = measured / FOLDERS[row.id]
    heads = into / CARRIED
    heads.mkdir(parents=True)
    for file in (WEIGHTS, *SMALL_FILES):
        if (source / file).is_file():
            shutil.copyfile(source / file, heads / file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)  # a path of this machine; the base is the repo they stand in
    if row.tree.paths:
        config["mergebot_tree"] = row.tree.paths
    write_json(heads / "config.json", config)
    write_generate_code(into)
    return {path.relative_to(into).as_posix(): _fact(path) for path in sorted(into.rglob("*")) if path.is_file()}


def _fetchable(weights: Path) -> bool:
    return weights.is_file() and weights.stat().st_size <= LIMIT_BYTES


def _fact(path: Path) -> PublishedFile:
    return PublishedFile(path.stat().st_size, sha256_file(path))
