"""Run many recipes through mergekit and through mergebot and hold the results against each other.

usage: MERGEKIT=path/to/mergekit-yaml python -m benchmarks.agreement GOLDEN [--random N] [--only TEXT] [--cache DIR]

GOLDEN is the folder whose `parents/` the recipes name. What mergekit made of a recipe is kept in the cache, so that
a second run asks only mergebot. mergekit is run as a command and is no dependency of anything here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.agreement.compare import Verdict, compare
from benchmarks.agreement.corners import corners
from benchmarks.agreement.drawn import at_random
from benchmarks.agreement.notation import Case

REFUSED = "refused.txt"


def cases(count: int, only: str) -> Iterator[Case]:
    """Every corner and `count` random recipes whose name contains `only`."""
    yield from (case for case in corners() if only in case[0])
    yield from (case for case in map(at_random, range(count)) if only in case[0])


def text_of(case: Case) -> str:
    """The recipe as YAML, without the anchors that PyYAML makes of repeated values."""
    return yaml.safe_dump(json.loads(json.dumps(case[1])), sort_keys=False)


def theirs(text: str, golden: Path, cache: Path, mergekit: str | None) -> Path | None:
    """The folder mergekit made of a recipe, or that holds why it refused; None: not cached and no mergekit."""
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    if mergekit is None:
        return None
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "out"
        recipe = Path(scratch) / "recipe.yml"
        recipe.write_text(text)
        done = subprocess.run(
            [mergekit, str(recipe), str(made), "--quiet", "--no-write-model-card"],  # a card asks the Hub
            cwd=golden,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            (made / REFUSED).write_text(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no word")
        (made / "recipe.yml").write_text(text)
        made.rename(folder)
    return folder


def ours(text: str, golden: Path, out: Path) -> str | None:
    """Merge into `out` as the command does, in a fork that has torch loaded; the sentence of a refusal."""
    recipe = out.parent / "recipe.yml"
    recipe.write_text(text)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_merge, args=(recipe, golden, out, sender))
    child.start()
    sender.close()
    try:
        said: str | None = receiver.recv()
    except EOFError:
        said = "died without a word"
    child.join()
    return said


def _merge(recipe: Path, golden: Path, out: Path, sender: object) -> None:
    from multiprocessing.connection import Connection

    from bot.cli import main

    assert isinstance(sender, Connection)
    os.chdir(golden)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            main.app(["merge", str(recipe), str(out), "--device", "cpu"], standalone_mode=False)
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")
            return
    sender.send(None)


def examine(case: Case, golden: Path, their_folder: Path) -> tuple[str, Verdict | None]:
    """What to print about one recipe, and the verdict where both programs merged it."""
    refusal = their_folder / REFUSED
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        said = ours(text_of(case), golden, out)
        if refusal.exists():
            reason = refusal.read_text()[:160]
            return (f"both refuse ({said})" if said else f"only mergekit refuses: {reason}"), None
        if said:
            return f"only mergebot refuses: {said}", None
        verdict = compare(out, their_folder, case[1])
    return "; ".join(verdict.differences[:4]), verdict


def main() -> int:
    """Compare; print a line per recipe that differs and the sum. Exit status 0 only if every recipe agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--random", type=int, default=60, help="random recipes to add")
    parser.add_argument("--only", default="", help="only recipes whose name contains this")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mergekit-agreement")
    parser.add_argument("--fill", action="store_true", help="only let mergekit make what the cache lacks")
    parser.add_argument("--verbose", action="store_true", help="a line for every recipe")
    asked = parser.parse_args()
    golden = asked.golden.resolve()
    asked.cache.mkdir(parents=True, exist_ok=True)
    if not asked.fill:
        import torch  # noqa: F401, the forks inherit it
    agreed = total = 0
    for case in cases(asked.random, asked.only):
        folder = theirs(text_of(case), golden, asked.cache, os.environ.get("MERGEKIT"))
        if folder is None or asked.fill:
            continue
        total += 1
        line, verdict = examine(case, golden, folder)
        good = (verdict is not None and not verdict.differences) or line.startswith("both refuse")
        agreed += good
        if asked.verbose or not good:
            far = f" (worst {verdict.worst:.2g}, {verdict.outside} of {verdict.elements} outside)" if verdict else ""
            print(f"{case[0]}: {line or 'agrees'}{far}", flush=True)
    if not asked.fill:
        print(f"{agreed} of {total} agree")
    return 0 if agreed == total else 1


if __name__ == "__main__":
    sys.exit(main())
