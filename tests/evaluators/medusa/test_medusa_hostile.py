"""What a stranger's repo says of its heads, and models that do not take what the engine would like to do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch

from bot.stages.head_candidates import _told_apart
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.model.attention import GROUPED, use_grouped
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import transfer
from evaluators.medusa.speed.report import Report
from evaluators.medusa.training import training_file
from evaluators.medusa.training.prompt_sets import Prompt, fingerprint
from evaluators.medusa.trees.tree import full
from evaluators.pictures.speed_figure import speed_figure


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('{"positions": "many", "steps": 3}', {"steps": 3}),
        ('{"positions": [1], "seed": NaN, "fit_s": 1e999, "generate_s": -1, "tokens": true}', {}),
        ('{"seed": "' + "A" * (17 << 20) + '"}', None),
        ('{"prompt_fingerprints": "' + "0123456789abcdef " * 100_000 + '", "steps": 2}', {"steps": 2}),
        ("[" * 100_000, None),
        ("[1, 2]", None),
        ('{"accuracy": [[1e400]], "steps": 2}', {"steps": 2}),
        ('{"accuracy": [[0.5, 0.25]], "positions": 7}', {"positions": 7, "accuracy": [[0.5, 0.25]]}),
        (json.dumps({"accuracy": [[10**400]]}), {}),
    ],
    ids=range(9),
)
def test_of_a_strangers_training_file_only_what_can_be_meant_is_known(
    text: str, known: dict[str, Any] | None, tmp_path: Path
) -> None:
    (tmp_path / "training.json").write_text(text)
    assert training_file.read(tmp_path) == known


def test_a_parents_word_on_what_its_heads_learnt_takes_no_verdict_from_the_others(tmp_path: Path) -> None:
    """Built-in questions are public: a stranger could name all of them, and no merge of that parent be measured."""
    test = [Prompt(str(n), "x", (f"Question {n}?",)) for n in range(20)]

    def given(name: str, origin: transfer.Origin, known: range) -> transfer.Given:
        folder = tmp_path / name.replace(":", "-")
        folder.mkdir()
        prints = " ".join(fingerprint(test[n].turns[0]) for n in known)
        (folder / "training.json").write_text(json.dumps({"prompt_fingerprints": prints}))
        return transfer.Given(name, origin, folder)

    honest, greedy = given("parent:a", "parent", range(2)), given("parent:b", "parent", range(20))
    merged, own = given("merged", "merged", range(0)), given("heads", "fresh", range(2, 6))
    left, known, kept = transfer.kept_apart(test, [honest, greedy, merged, own], 8)
    assert [prompt.id for prompt in left] == [str(n) for n in range(6, 20)] and sorted(known) == list("012345")
    assert kept[0] == honest and kept[3] == own
    assert [(each.folder, "were trained on" in (each.absent_because or "")) for each in kept[1:3]] == [(None, True)] * 2
    assert transfer.kept_apart(test, [given("all", "fresh", range(20))], 8)[0] == []


def test_a_refused_report_draws_nothing() -> None:
    row = {"id": "fresh", "origin": "fresh", "absent_because": None}
    assert speed_figure(Report.from_dict({"refusal": "the clocks disagree.", "candidates": [row, row]})) == ""


def test_heads_of_one_name_are_told_apart() -> None:
    assert _told_apart(["heads", "x", "heads"]) == ["heads-1", "x", "heads-2"]


def test_a_tree_that_asks_for_more_ranks_than_there_are_tokens_gets_the_last_again() -> None:
    base = tiny.base("llama")
    heads = tiny.random_heads(base, HeadSpec("shared", 2, keep=(4, 9, 250)))
    tokens = HeadDrafter(heads).propose(torch.randn(base.hidden), 5, [5], full((5, 2)))
    assert len(tokens) == 15 and set(tokens.tolist()) <= {4, 9, 250}


class Sparse:
    """Stands for a modelling file that asks for its attention by name, as those with sparse attention do."""

    source = 'if config._attn_implementation in ("eager", "sdpa"):\n    mask = indices'


def test_models_that_ask_for_their_attention_by_name_keep_it() -> None:
    from evaluators.medusa.model.attention import CHECKS_NAME

    assert CHECKS_NAME.search(Sparse.source)
    assert not CHECKS_NAME.search("interface(self.config._attn_implementation, eager_attention_forward)")
    base = Base(tiny.model("gqa"), tiny.tokenizer())
    use_grouped(base)
    assert base.model.config._attn_implementation == GROUPED
