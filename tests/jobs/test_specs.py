"""The specs of the stages cross a process border as JSON and come back equal."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bot.errors import Failed
from bot.jobs.job import Lease, PublishedFile, Source
from bot.jobs.request import EvaluateOptions
from bot.jobs.specs import (
    BoardSpec,
    EvaluateSpec,
    MergeSpec,
    PublicationContent,
    PublishSpec,
    ReplySpec,
    decode,
    encode,
)

SOURCES = (Source("org/a", "a" * 40, "mit", 10), Source("org/b", "b" * 40, None, 20, adapter=True))
FILES = {"model.safetensors": PublishedFile(10, "c" * 64)}
CONTENT = PublicationContent("d" * 64, "e" * 64, "f" * 12, FILES, {}, {"org/x": {"README.md": "# x\n"}}, SOURCES)


@pytest.mark.parametrize(
    "spec",
    [
        MergeSpec("{}", Path("out"), 1, SOURCES, EvaluateOptions()),
        EvaluateSpec(Path("out"), Path("scratch"), "e" * 64, SOURCES, EvaluateOptions(suite="none")),
        PublishSpec(Lease("j", "o", "t", datetime(2026, 1, 2, tzinfo=UTC)), Path("out"), Path("carried"), CONTENT),
        BoardSpec({"org/board": {"a.jsonl": "{}\n"}}, "message"),
        ReplySpec("org/x", "title", "opening", "published", "text", "ref"),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_a_spec_comes_back_equal_from_json(spec: Any) -> None:
    assert decode(type(spec), json.loads(json.dumps(encode(spec)))) == spec


def test_a_spec_of_another_shape_is_not_accepted() -> None:
    with pytest.raises(Failed, match="The MergeSpec of a stage cannot be read") as caught:
        decode(MergeSpec, {"out": "o", "seed": 0, "sources": [], "evaluate": {}})
    assert caught.value.code == "INTERNAL" and "(recipe is missing" in caught.value.message
