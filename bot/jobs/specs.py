"""Specs of the stages: what the scheduler hands to the worker and the publisher, as JSON on disk.

The result of a stage is a fact of `bot.jobs.job`, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bot.errors import Failed
from bot.jobs.job import Lease, PublishedFile, Source
from bot.jobs.request import EvaluateOptions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """Merge the canonical `recipe` into the folder `out`. The sources that `evaluate` measures are fetched whole."""

    recipe: str
    out: Path
    seed: int
    sources: tuple[Source, ...]
    evaluate: EvaluateOptions


@dataclass(frozen=True, slots=True)
class EvaluateSpec:
    """Measure the files of the manifest with the SHA-256 `manifest` in the folder `out`."""

    out: Path
    scratch: Path
    manifest: str
    sources: tuple[Source, ...]
    evaluate: EvaluateOptions


@dataclass(frozen=True, slots=True)
class PublicationContent:
    """Content of a publication: files by path, and the finished texts for each name to try, in order."""

    digest: str
    manifest: str
    key12: str
    files: Mapping[str, PublishedFile]
    heads: Mapping[str, PublishedFile]
    texts: Mapping[str, Mapping[str, str]]  # repo id -> path -> text
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class PublishSpec:
    """Publish `content` under `lease`: its files are in `out`, its heads in `carried`."""

    lease: Lease
    out: Path
    carried: Path
    content: PublicationContent


@dataclass(frozen=True, slots=True)
class BoardSpec:
    """Write the datasets of the leaderboard: repo id -> path -> text."""

    datasets: Mapping[str, Mapping[str, str]]
    message: str


@dataclass(frozen=True, slots=True)
class ReplySpec:
    """Post `text` once, marked by the line `ref`, in the discussion `title` of a repo."""

    repo: str
    title: str
    opening: str
    event: str
    text: str
    ref: str


def encode(value: Any) -> Any:
    """A spec or a result as JSON values."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def decode(kind: type[T], value: Any) -> T:
    """The inverse of `encode`. Raises Failed INTERNAL for another shape."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise Failed(
            "INTERNAL",
            f"The {kind.__name__} of a stage cannot be read ({wrong} is missing or has another type).",
            "Run the same version of mergebot in scheduler, worker and publisher.",
        ) from error
