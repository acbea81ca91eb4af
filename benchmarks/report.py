"""From costs to benchmarks/RESULTS.md and the raw figures beside it."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import Cost
from benchmarks.sections import section

Key = tuple[str, str]  # (size or kind, method or what)
ANALYSIS = "ANALYSIS.md"  # written by hand, stands at the end of the results
DECODING = "decoding"  # the section that benchmarks.decoding writes, kept as it is
BOTH_THREADS = (1, 2)
FLOOR, HASHED, OURS, THEIRS = "floor", "floor+hash", "mergebot", "mergekit"  # the programs that are timed


@dataclass(slots=True)
class Results:
    """Everything measured so far."""

    about: Mapping[str, Any]
    costs: dict[Key, dict[str, list[Cost]]] = field(default_factory=dict)
    sizes: dict[Key, tuple[int, int]] = field(default_factory=dict)  # bytes read and written

    @classmethod
    def begin(cls, mergekit: str | None, options: Mapping[str, Any]) -> Results:
        """No results yet; what is true of all of them."""
        kept = ("methods", "parameters", "parents", "repeat", "mergekit_repeat", "rows", "device", "budget_s")
        return cls({**machine(), "mergekit": mergekit_version(mergekit), "options": {k: options[k] for k in kept}})

    def add(self, key: Key, program: str, cost: Cost) -> None:
        self.costs.setdefault(key, {}).setdefault(program, []).append(cost)

    def walls(self, key: Key, program: str) -> list[float]:
        """Wall seconds of the runs that ended well."""
        return [cost.wall_s for cost in self.costs.get(key, {}).get(program, []) if not cost.status]

    def threads_for(self, method: str) -> tuple[int, ...]:
        """mergekit's thread counts to try: both, or the one that was faster on the real model, if it was slow there."""
        walls = {n: self.walls(("135M", method), f"{THEIRS} {n}") for n in BOTH_THREADS}
        if not all(walls.values()) or min(map(min, walls.values())) < 12:
            return BOTH_THREADS
        return (min(walls, key=lambda n: statistics.median(walls[n])),)

    def write(self, file: Path) -> None:
        """RESULTS.md and results.json beside it."""
        raw = [
            {"what": list(key), "bytes": self.sizes.get(key), "program": program, "runs": [_figures(c) for c in costs]}
            for key, programs in self.costs.items()
            for program, costs in programs.items()
        ]
        file.with_name("results.json").write_text(json.dumps({"about": self.about, "measured": raw}, indent=1) + "\n")
        analysis = file.with_name(ANALYSIS)
        parts = [self._head(), *self._merges(), self._starts(), self._memory()]
        if analysis.exists():
            parts.append(analysis.read_text())
        if file.exists():
            parts.append(section(file.read_text(), DECODING))
        file.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")

    # -- the sections of the page ---------------------------------------------------------------------------------

    def _head(self) -> str:
        about = self.about
        options = " · ".join(
            f"{name} {','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
            for name, value in about["options"].items()
        )
        return f"""# How fast the merge engine is

Measured {about["date"]} by `make bench-merge` on {about["machine"]}; Python {about["python"]}, torch {about["torch"]},
numpy {about["numpy"]}, safetensors {about["safetensors"]}; mergekit: {about["mergekit"] or "not run"}.
Options: {options}.

Every row is whole processes, started fresh, imports and hashing included, in alternation; medians (smallest to
largest). The page cache is warm for all. **Floor**: one plain process reads every byte the merge reads and writes as
many as it writes, with the same preallocation and `fdatasync`, and computes nothing. **Floor + hash** also takes the
SHA-256 of what it writes, which mergebot records and mergekit does not. **Engine** is the merge itself as mergebot
prints it: the process without the start of Python, the plan and the import of torch, which cost the same whatever the
size. mergebot syncs its output, mergekit does not. mergekit: its defaults (`--no-write-model-card`, which would ask
the Hub), the faster of
`OMP_NUM_THREADS` 1 and 2; where it is slow, only the count that was faster on the 135 M model is run. Memory is the
peak of 50 ms polls over all processes: *anonymous* is what the program holds, *resident* includes mapped files. CPU is
user + system seconds."""

    def _merges(self) -> list[str]:
        out = []
        for size in dict.fromkeys(key[0] for key in self.sizes):
            rows = [self._row(key) for key in self.sizes if key[0] == size and self.costs.get(key)]
            out.append(f"## Merges, {size} parameters, bfloat16\n\n" + _table(COLUMNS, rows))
        return out

    def _row(self, key: Key) -> list[str]:
        floor, ours = self.walls(key, FLOOR), self.walls(key, OURS)
        hashed = self.walls(key, HASHED)
        programs = self.costs[key]
        mine = programs.get(OURS, [])
        engine = [found for cost in mine if (found := _engine_s(cost)) is not None]
        theirs = {name: costs for name, costs in programs.items() if name.startswith(THEIRS)}
        ended = {name: self.walls(key, name) for name in theirs if self.walls(key, name)}
        best = min(ended, key=lambda name: statistics.median(ended[name])) if ended else None
        shown, ratio, other = "-", "-", (theirs[best] if best else [])
        if best:
            shown = f"{seconds(ended[best])} ({best.split()[1]} thr)"
            ratio = f"**{statistics.median(ended[best]) / statistics.median(ours):.1f}**" if ours else "-"
        elif any(cost.stopped for costs in theirs.values() for cost in costs):
            bound = max(cost.wall_s for costs in theirs.values() for cost in costs if cost.stopped)
            shown, ratio = f"> {bound:.0f} (stopped)", f"> {bound / statistics.median(ours):.1f}" if ours else "-"
        read, written = self.sizes[key]
        return [
            key[1],
            f"{read / 1e9:.2f} / {written / 1e9:.2f}",
            seconds(floor),
            seconds(hashed),
            seconds(ours) if ours else _failed(mine),
            seconds(engine),
            _ratio(ours, floor),
            _ratio(ours, hashed),
            _ratio(engine, floor),
            shown,
            ratio,
            _median([c.cpu_s for c in mine], "{:.1f}"),
            _median([c.cpu_s for c in other], "{:.1f}"),
            _median([c.anonymous_bytes / 1e9 for c in mine], "{:.2f}"),
            _median([c.rss_bytes / 1e9 for c in mine], "{:.2f}"),
            _median([c.rss_bytes / 1e9 for c in other], "{:.2f}"),
        ]

    def _starts(self) -> str:
        rows = [
            [what, seconds(self.walls((size, what), OURS)), str(len(programs[OURS]))]
            for (size, what), programs in self.costs.items()
            if size == "start"
        ]
        return "## Start-up\n\n" + _table(("command", "wall s", "runs"), rows) if rows else ""

    def _memory(self) -> str:
        rows = []
        for (size, what), programs in self.costs.items():
            if size == "memory":
                cost = programs[OURS][0]
                state = _failed([cost]) if cost.status else f"{cost.wall_s:.1f}"
                rows.append([what, state, f"{cost.anonymous_bytes / 1e9:.2f}", f"{cost.rss_bytes / 1e9:.2f}"])
        return "## Memory\n\n" + _table(("merge", "wall s", "anonymous GB", "resident GB"), rows) if rows else ""


COLUMNS = (
    "method",
    "GB read / written",
    "floor s",
    "floor + hash s",
    "mergebot s",
    "engine s",
    "× floor",
    "× floor + hash",
    "engine × floor",
    "mergekit s",
    "mergekit ÷ mergebot",
    "CPU s mergebot",
    "CPU s mergekit",
    "anonymous GB mergebot",
    "resident GB mergebot",
    "resident GB mergekit",
)


def _engine_s(cost: Cost) -> float | None:
    """The seconds of the merge itself, from the sentence the command ends with."""
    found = re.search(r"\sin\s+([\d.]+)\s+s\.", cost.said)
    return float(found.group(1)) if found and not cost.status else None


def seconds(values: Sequence[float]) -> str:
    """Median, and smallest to largest where there are several."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def millions(parameters: int) -> str:
    """1100048384 -> 1.10B."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def machine() -> dict[str, Any]:
    """What the figures depend on; no host name and no path."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{names[0] if names else platform.machine()}, {cores} cores, {memory / 2**30:.0f} GiB, Linux",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "safetensors")},
    }


def mergekit_version(mergekit: str | None) -> str | None:
    """Version of the mergekit behind a command, asked of the Python that stands beside it."""
    if mergekit is None:
        return None
    code = "from importlib.metadata import version as v; print('mergekit', v('mergekit') + ', torch', v('torch'))"
    done = subprocess.run([Path(mergekit).parent / "python", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "of unknown version"


def _ratio(ours: Sequence[float], floor: Sequence[float]) -> str:
    return f"**{statistics.median(ours) / statistics.median(floor):.2f}**" if ours and floor else "-"


def _figures(cost: Cost) -> dict[str, Any]:
    """A cost without what the program said, which names folders of the machine."""
    return {name: value for name, value in asdict(cost).items() if name != "said"}


def _median(values: Sequence[float], shape: str) -> str:
    return shape.format(statistics.median(values)) if values else "-"


def _failed(costs: Sequence[Cost]) -> str:
    return f"failed ({costs[0].status})" if costs else "-"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
