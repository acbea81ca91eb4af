"""Which value a setting has for which tensor (merging.md 1.3), from the recipe's text to the plan's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import llama_tensors, plan_of, save

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed, layers=5))
    return tmp_path


def values(text: str, folder: Path, name: str, source: int | None = None) -> dict[str, Any]:
    """The value for every tensor: of a shared parameter, or of one input's."""
    planned, _ = plan_of(text, folder)
    if source is None:
        return {step.name: step.work.shared[name] for step in planned.steps}
    return {step.name: step.work.per_input[name][source] for step in planned.steps}


def mlp(i: int) -> str:
    return f"model.layers.{i}.mlp.up_proj.weight"


def attention(i: int) -> str:
    return f"model.layers.{i}.self_attn.q_proj.weight"


SLICED = """
merge_method: ties
base_model: base
modules:
  default:
    parameters: {MODULE}
    slices:
    - sources:
      - {model: base, layer_range: [0, 5]}
      - {model: a, layer_range: [0, 5], parameters: {SOURCE}}
      parameters: {SLICE}
parameters: {TOP}
"""


def leveled(**levels: str) -> str:
    text = SLICED
    for level in ("MODULE", "SOURCE", "SLICE", "TOP"):
        text = text.replace(f"{{{level}}}", levels.get(level, "{}"))
    return text


def test_source_beats_slice_beats_module_beats_top_beats_default(models: Path) -> None:
    given = {"SOURCE": "{weight: 1}", "SLICE": "{weight: 2}", "MODULE": "{weight: 3}", "TOP": "{weight: 4}"}
    for expected, level in enumerate(list(given), start=1):
        assert set(values(leveled(**given), models, "weight", 1).values()) == {float(expected)}
        given[level] = "{}"
    assert set(values(leveled(TOP="{weight: 4}"), models, "density", 1).values()) == {1.0}


def test_shared_parameters_are_not_read_from_a_source(models: Path) -> None:
    text = leveled(SOURCE="{weight: 1, lambda: 9}", SLICE="{lambda: 2}", MODULE="{lambda: 3}", TOP="{lambda: 4}")
    assert set(values(text, models, "lambda").values()) == {2.0}


def test_a_level_whose_conditions_do_not_match_falls_through(models: Path) -> None:
    source, piece = "{weight: [{filter: mlp, value: 1}]}", "{weight: []}"
    module, top = "{weight: [{filter: q_proj, value: [0, 2]}]}", "{weight: [{filter: '*', value: 7}]}"
    got = values(leveled(SOURCE=source, SLICE=piece, MODULE=module, TOP=top), models, "weight", 1)
    assert [got[mlp(i)] for i in range(5)] == [1.0] * 5
    assert [got[attention(i)] for i in range(5)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert got[EMBEDDING] == got[NORM] == got["model.layers.3.input_layernorm.weight"] == 7.0


def test_the_first_matching_condition_wins_and_a_filter_is_a_plain_substring(models: Path) -> None:
    text = leveled(TOP="{weight: [{filter: layers.1., value: 1}, {filter: mlp, value: 2}, {value: 3}, {value: 4}]}")
    got = values(text, models, "weight", 1)
    assert got[mlp(1)] == got[attention(1)] == 1.0
    assert got[mlp(2)] == 2.0
    assert got[attention(2)] == got[EMBEDDING] == 3.0


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ("[0, 1]", [0, 0.25, 0.5, 0.75, 1]), ("[0, 0.5, 1]", [0, 0.25, 0.5, 0.75, 1]),
        ("[0, 1, 0]", [0, 0.5, 1, 0.5, 0]), ("[0.3]", [0.3] * 5), ("[1, 0, 0, 0, 0]", [1, 0, 0, 0, 0]),
        ("['0.0', 1e-0]", [0, 0.25, 0.5, 0.75, 1]),
    ],
)  # fmt: skip
def test_a_gradient_is_linear_between_its_entries_and_starts_with_the_embeddings(
    gradient: str, expected: list[float], models: Path
) -> None:
    got = values(leveled(TOP=f"{{weight: 1, density: {gradient}}}"), models, "density", 1)
    assert [got[mlp(i)] for i in range(5)] == pytest.approx(expected)
    assert got[EMBEDDING] == got[NORM] == got["lm_head.weight"] == pytest.approx(expected[0])


def test_a_gradient_of_switches_takes_the_entry_below(models: Path) -> None:
    got = values(leveled(TOP="{weight: 1, normalize: [true, false, true]}"), models, "normalize")
    assert [got[mlp(i)] for i in range(5)] == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("written", "value"),
    [("true", True), ("no", False), ("'on'", True), ("'off'", False), ("1", True), ("0", False), ("'yes'", True)],
)
def test_switches_may_be_spelled_as_people_do(written: str, value: bool, models: Path) -> None:
    assert set(values(leveled(TOP=f"{{weight: 1, normalize: {written}}}"), models, "normalize").values()) == {value}


@pytest.mark.parametrize("written", ["1e-3", "'1e-3'", "0.001", "1.0E-3", "'0.001'"])
def test_numbers_may_be_written_as_text_which_yaml_takes_1e_3_for(written: str, models: Path) -> None:
    assert set(values(leveled(TOP=f"{{weight: 1, density: {written}}}"), models, "density", 1).values()) == {0.001}
