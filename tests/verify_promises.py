"""Checks the bot's promises from its database and the Hub's disk alone: the bot does not mark its own homework.

1  every accepted request ends as published, failed with a reason, or cancelled
2  nothing is published that was not evaluated, byte for byte
3  a request is published at most once
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from bot.settings import Settings


def broken_promises(settings: Settings, hub: Path) -> list[str]:
    """One sentence for every promise that does not hold; empty when all do."""
    database = sqlite3.connect(settings.home / "mergebot.db")
    database.row_factory = sqlite3.Row
    jobs = database.execute("select * from jobs").fetchall()
    facts: dict[tuple[str, str], Any] = {
        (row["job_id"], row["kind"]): json.loads(row["body"])
        for row in database.execute("select * from facts order by number")
    }
    broken = [f"request {row['key']} has neither a job nor a refusal" for row in database.execute(
        "select key from requests where job_id is null and refusal is null")]  # fmt: skip
    database.close()
    markers = _markers(hub, settings.namespace)
    for job in jobs:
        broken += _of_job(job, facts, markers, hub)
    digests = [marker["digest"] for marker in markers.values()]
    broken += [f"digest {digest} is published more than once" for digest in set(digests) if digests.count(digest) > 1]
    known = {job["digest"] for job in jobs}
    broken += [f"{repo} was published for no job" for repo, marker in markers.items() if marker["digest"] not in known]
    return broken


def _of_job(job: sqlite3.Row, facts: dict[tuple[str, str], Any], markers: dict[str, Any], hub: Path) -> list[str]:
    name, broken = job["id"], []
    publication, failure = facts.get((name, "publication")), facts.get((name, "failure"))
    endings = [publication is not None, job["cancelled_at"] is not None, bool(failure and failure["retry_at"] is None)]
    if sum(endings) != 1 and not publication:
        broken.append(f"job {name} has {sum(endings)} endings")
    if publication is None:
        return broken
    merge, evaluation = facts[name, "merge"], facts[name, "evaluation"]
    if evaluation["manifest"] != merge["manifest"]:
        broken.append(f"job {name} published what it did not evaluate")
    if markers.get(publication["repo"], {}).get("manifest") != merge["manifest"]:
        broken.append(f"{publication['repo']} does not carry the manifest of job {name}")
    repo = hub / "repos" / "models" / publication["repo"]
    stored = json.loads((repo / "commits" / f"{publication['commit']}.json").read_text())["files"]
    for path, file in merge["files"].items():
        if path not in stored or _sha256(hub, repo, stored[path]) != file["sha256"]:
            broken.append(f"{path} of {publication['repo']} is not the evaluated file")
    if len(list((repo / "commits").glob("*.json"))) != 2:
        broken.append(f"{publication['repo']} was written more than once")
    return broken


def _markers(hub: Path, namespace: str) -> dict[str, Any]:
    """The marker of every repo of the bot's that has one on main."""
    found = {}
    for repo in sorted((hub / "repos" / "models" / namespace).glob("*")):
        head = json.loads((repo / "refs.json").read_text())["heads"]["main"]
        files = json.loads((repo / "commits" / f"{head}.json").read_text())["files"]
        if ".mergebot.json" in files:
            text = (repo / "objects" / files[".mergebot.json"]["oid"]).read_bytes()
            found[f"{namespace}/{repo.name}"] = json.loads(text)
    return found


def _sha256(hub: Path, repo: Path, file: dict[str, Any]) -> str:
    sha256 = file["sha256"]
    stored = hub / "blobs" / sha256[:2] / sha256 if sha256 else repo / "objects" / file["oid"]
    return hashlib.sha256(stored.read_bytes()).hexdigest()
