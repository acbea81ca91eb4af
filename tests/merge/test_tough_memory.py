"""Memory grows with pieces, not with tensors or models (tough case 4 of merging.md 6), scaled down.

A child process merges one tensor under a limit on what it may allocate. The limit leaves room for the interpreter,
for torch and for pieces, not for a single copy of the tensor: the same limit is shown to break such a copy.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import llama_tensors, save

HERE = Path(__file__).parent
ROWS, WIDTH = 24_000, 4096  # 98 M elements, 197 MB in bfloat16, 393 MB in float32
NAME = "model.layers.0.mlp.up_proj.weight"
ALLOWANCE = 185 * 2**20  # what the merge may allocate beside what was there with torch warm
CHILD = """
import os, resource, sys
sys.path.insert(0, {here!r})
from pathlib import Path
import torch
from tiny_checkpoints import merge
torch.set_num_threads(1)
merge({small!r}, Path({folder!r}), Path({folder!r}) / "warm")
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + {allowance}, now + {allowance}))
try:
    torch.empty({rows}, {width}, dtype=torch.bfloat16).fill_(1.0)
    print("copied")
except RuntimeError:
    print("no room for a copy")
merge({text!r}, Path({folder!r}), Path({folder!r}) / "out")
print("merged")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    for seed, name in enumerate(("base", "a", "b")):
        tensors = llama_tensors(seed, layers=1)
        save(folder / f"small-{name}", tensors, dtype=torch.bfloat16)
        large = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
        for start in range(0, ROWS, 1000):
            noise = torch.randn(1000, 1, generator=torch.Generator().manual_seed(start + seed)) * 0.1 * seed
            large[start : start + 1000] = row + noise * row.roll(seed)
        save(folder / name, {**tensors, NAME: large})
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
@pytest.mark.parametrize("method", ["ties", "karcher"])
def test_a_tensor_larger_than_the_memory_allowed_is_merged(method: str, models: Path) -> None:
    def text(prefix: str) -> str:
        base = "" if method == "karcher" else f"base_model: {prefix}base\n"
        inputs = ["a"] if method == "arcee_fusion" else ["a", "b"]
        listed = ", ".join(f"{{model: {prefix}{name}}}" for name in inputs)
        return f"merge_method: {method}\n{base}models: [{listed}]\nparameters: {{weight: 0.7, density: 0.4}}\n"

    script = CHILD.format(
        here=str(HERE), small=text("small-"), text=text(""), folder=str(models), allowance=ALLOWANCE, rows=ROWS,
        width=WIDTH,
    )  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE.parents[1])
        assert done.stdout.splitlines() == ["no room for a copy", "merged"], done.stderr[-2000:]
        merged = load_file(models / "out" / "model.safetensors")[NAME]
        assert merged.shape == (ROWS, WIDTH)
        assert bool(merged[:: ROWS // 7].isfinite().all())
    finally:
        for out in ("out", "warm"):
            for file in (models / out).glob("*"):
                file.unlink()
            (models / out).rmdir()
