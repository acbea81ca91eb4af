"""A source that is edited while it is merged spoils the merge, and the merge says so instead of finishing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bot.errors import Failed
from bot.merge.execution import engine
from bot.merge.execution.options import MergeOptions
from tests.merge.tiny_checkpoints import llama_tensors, plan_of, save

RECIPE = """merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 1}}
"""


@pytest.mark.parametrize("how", ["edited in place", "replaced by an equal copy", "gone"])
def test_a_source_edited_under_way_ends_the_merge_by_name(tmp_path: Path, how: str) -> None:
    for number, name in enumerate("ab"):
        save(tmp_path / name, llama_tensors(number))
    planned, folders = plan_of(RECIPE, tmp_path)
    victim = tmp_path / "b" / "model.safetensors"
    content = victim.read_bytes()

    def edit(done: int, total: int, tensor: str) -> None:
        if done < total or not victim.exists():
            return
        if how == "edited in place":
            with victim.open("rb+") as file:
                file.seek(len(content) - 4)
                file.write(b"\0\0\0\0")
        elif how == "gone":
            victim.unlink()
        else:
            (tmp_path / "copy").write_bytes(content)
            os.utime(tmp_path / "copy", ns=(victim.stat().st_atime_ns, victim.stat().st_mtime_ns))
            (tmp_path / "copy").replace(victim)

    with pytest.raises(Failed) as caught:
        engine.merge(planned, folders, tmp_path / "out", MergeOptions(progress=edit))
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE"
    assert "model.safetensors of b" in caught.value.message
    assert not (tmp_path / "out").exists()
