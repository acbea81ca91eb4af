"""A published merge carries the heads that won its speed test, else the fresh ones, and the code that uses them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bot.stages.published_heads import FOLDERS, carry
from evaluators.medusa.speed.report import Row


def speed_test(folder: Path, chosen: str = "none") -> dict[str, Any]:
    """The folder and the report of a speed test with three sets of heads."""
    rows = []
    for number, (name, place) in enumerate(FOLDERS.items()):
        (folder / place).mkdir(parents=True)
        save_file(
            {"0.0.linear.weight": torch.full((2, 2), float(number))}, folder / place / "medusa_lm_head.safetensors"
        )
        (folder / place / "config.json").write_text('{"base_model_name_or_path": "model", "medusa_num_heads": 1}')
        (folder / place / "training.json").write_text("{}")
        row = Row(name, "fresh" if name == "fresh" else "merged").as_dict()
        row["training"]["steps"], row["tree"]["paths"] = 3, [[0], [1]]
        rows.append(row)
    return {"chosen": chosen, "candidates": rows}


@pytest.mark.parametrize(("chosen", "carried"), [("none", 0.0), ("fresh", 0.0), ("merged", 1.0), ("merged_tuned", 2.0)])
def test_the_winner_is_carried_and_the_fresh_heads_where_nothing_won(
    tmp_path: Path, chosen: str, carried: float
) -> None:
    speed, into = speed_test(tmp_path / "medusa", chosen), tmp_path / "carried"
    files = carry(tmp_path / "medusa", speed, into)
    assert set(files) == {
        "medusa/medusa_lm_head.safetensors", "medusa/config.json", "medusa/training.json", "custom_generate/generate.py"
    }  # fmt: skip
    for name, fact in files.items():
        data = (into / name).read_bytes()
        assert (fact.bytes, fact.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    source = tmp_path / "medusa" / FOLDERS[list(FOLDERS)[int(carried)]] / "medusa_lm_head.safetensors"
    assert (into / "medusa" / "medusa_lm_head.safetensors").read_bytes() == source.read_bytes()
    told = json.loads((into / "medusa" / "config.json").read_text())
    assert told == {"medusa_num_heads": 1, "mergebot_tree": [[0], [1]]}
    compile((into / "custom_generate" / "generate.py").read_text(), "generate.py", "exec")
    assert carry(tmp_path / "medusa", speed, into) == files


def test_heads_that_learnt_nothing_or_are_not_there_are_not_carried(tmp_path: Path) -> None:
    speed = speed_test(tmp_path / "medusa")
    speed["candidates"][0]["training"]["steps"] = 0
    assert carry(tmp_path / "medusa", speed, tmp_path / "carried") == {}
    refused = {"chosen": "none", "candidates": [Row("none", "none").as_dict()]}
    assert carry(tmp_path / "nothing", refused, tmp_path / "carried") == {}
    assert not (tmp_path / "carried").exists()
