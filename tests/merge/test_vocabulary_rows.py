"""Random vocabularies, permuted, padded and cut, against a slow reference that looks at one token at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocabulary import EMBEDDING, SHARED, ids_of, model
from tiny_checkpoints import load, merge, plan_of

from bot.errors import Refused

NAMES = ("a", "b", "c")
WEIGHTS = {"a": 0.5, "b": 0.25, "c": -0.75}
Matrices = Mapping[str, torch.Tensor]


def recipe_of(policy: str, padding: int | None, rules: str = "") -> str:
    models = ", ".join(f"{{model: {name}, parameters: {{weight: {WEIGHTS[name]}}}}}" for name in NAMES)
    pad = "" if padding is None else f", pad_to_multiple_of: {padding}"
    return (
        f"merge_method: linear\nbase_model: a\nmodels: [{models}]\nparameters: {{normalize: false}}\n"
        f"tokenizer: {{source: {policy}{pad}{rules}}}"
    )


def own_row(token: str, name: str, held: Mapping[str, Mapping[str, int]], matrices: Matrices) -> torch.Tensor:
    """The row of `token` in one source, as merging.md 3.2 says, in so many words."""
    if token in held[name]:
        return matrices[name][held[name][token]]
    having = [other for other in NAMES if token in held[other]]
    if len(having) == 1 or (having and "a" in having):
        other = having[0] if len(having) == 1 else "a"
        return matrices[other][held[other][token]]
    if having:
        return torch.stack([matrices[other][held[other][token]] for other in having]).mean(0)
    return torch.zeros_like(matrices[name][0])


words = st.lists(st.sampled_from([f"t{i}" for i in range(12)]), unique=True, max_size=12)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(words, st.integers(-2, 5)), min_size=3, max_size=3),
    st.sampled_from(["union", "base", "b"]),
    st.sampled_from([None, 1, 8]),
)
def test_every_row_is_what_the_reference_says(
    drawn: Sequence[tuple[Sequence[str], int]], policy: str, padding: int | None
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        matrices, held = {}, {}
        for seed, (name, (chosen, extra)) in enumerate(zip(NAMES, drawn, strict=True)):
            vocabulary = [*SHARED[:3], *chosen]
            matrices[name] = model(folder / name, seed, vocabulary, rows=max(3, len(vocabulary) + extra))[EMBEDDING]
            held[name] = {word: i for i, word in enumerate(vocabulary) if i < len(matrices[name])}
        merge(recipe_of(policy, padding), folder, folder / "out")
        ids, out = ids_of(folder / "out"), load(folder / "out")[EMBEDDING]
        giver = "b" if policy == "b" else "a"
        known = set(ids_of(folder / giver))
        if policy == "union":
            known |= {token for name in NAMES for token in held[name]}
        assert set(ids) == known
        assert {token: ids[token] for token in ids_of(folder / giver)} == dict(ids_of(folder / giver))
        used = max(ids.values()) + 1
        assert len(out) == (-(-used // padding) * padding if padding else max(used, len(matrices[giver])))
        untouched = all(held[name] == ids and len(matrices[name]) == len(out) for name in NAMES)
        for k in range(len(out)):
            token = next((token for token, i in ids.items() if i == k), None)
            if token is None and untouched:
                rows = {name: matrices[name][k] for name in NAMES}
            elif token is None:
                rows = {
                    name: torch.stack([own_row(one, name, held, matrices) for one in ids]).mean(0) for name in NAMES
                }
            else:
                rows = {name: own_row(token, name, held, matrices) for name in NAMES}
            expected = sum((WEIGHTS[name] * rows[name] for name in NAMES), torch.zeros(out.shape[1]))
            torch.testing.assert_close(out[k], expected, rtol=1e-5, atol=1e-5)


def test_new_tokens_come_source_by_source_by_id_ordinary_ones_before_added_ones(tmp_path: Path) -> None:
    model(tmp_path / "a", 0, SHARED)
    model(tmp_path / "b", 1, ["z", *SHARED, "y"], ["<b>"])
    model(tmp_path / "c", 2, ["x", *SHARED], ["<c>", "<b>"])
    merge(recipe_of("union", None), tmp_path, tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert sorted(ids, key=lambda token: ids[token])[len(SHARED) :] == ["z", "y", "<b>", "x", "<c>"]


def test_a_token_without_a_row_is_not_taken_over_and_a_notice_says_so(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        model(tmp_path / name, seed, SHARED, ["<lost>"] if name == "c" else [], rows=len(SHARED))
    planned, _ = plan_of(recipe_of("union", None), tmp_path)
    assert "TOKENS_WITHOUT_ROW" in {notice.code for notice in planned.notices}
    assert planned.vocabulary is not None
    assert "<lost>" not in planned.vocabulary.ids


def test_a_row_can_be_named_by_number_even_where_no_token_stands(tmp_path: Path) -> None:
    matrices = {name: model(tmp_path / name, seed, SHARED, rows=20) for seed, name in enumerate(NAMES)}
    rule = ", tokens: {new: {source: {kind: model_token, model: b, token_id: %d}}}"
    merge(recipe_of("union", None, rule % 19), tmp_path, tmp_path / "out")
    out, ids = load(tmp_path / "out")[EMBEDDING], ids_of(tmp_path / "out")
    torch.testing.assert_close(out[ids["new"]], sum(WEIGHTS.values()) * matrices["b"][EMBEDDING][19])
    for wrong in (20, -1):
        with pytest.raises(Refused, match="row"):
            plan_of(recipe_of("union", None, rule % wrong), tmp_path)
