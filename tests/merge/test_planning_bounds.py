"""What planning a stranger's recipe may cost: tensors, layers and looks are counted before anything is built."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from claimed_checkpoint import Claimed
from in_memory import TensorView
from safetensors.torch import save_file
from test_vocabulary import SHARED, model, tokenizer
from tiny_checkpoints import llama_tensors, plan_of, save

from bot.errors import Refused
from bot.merge.checkpoints import checkpoint
from bot.merge.checkpoints.checkpoint import TRUSTED, UNTRUSTED, Limits
from bot.merge.execution.gather import GatheredView
from bot.merge.planning import plan, planner, summary
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.document import nearest
from bot.merge.tokenizer.rows import Fill, RowMap

UNION = "tokenizer: {source: union}\nbase_model: a\nmerge_method: linear\nmodels:\n- {model: a}\n- {model: b}\n"
UNION += "parameters: {weight: 1}\n"


def repeated(first: int, second: int) -> str:
    """Two documents: one stacks a two-layer model `first` times, the other stacks the result `second` times."""
    once = "\n".join("- sources: [{model: own/a, layer_range: [0, 2]}]" for _ in range(first))
    again = "\n".join(f"- sources: [{{model: s, layer_range: [0, {2 * first}]}}]" for _ in range(second))
    passing = "merge_method: passthrough\nslices:\n"
    return f"name: s\n{passing}{once}\n---\n{passing}{again}\n"


def planned(text: str, layers: int = 2, limits: Limits = UNTRUSTED) -> plan.Plan:
    parsed = recipe.parse(text, trust="stranger")
    opened = checkpoint.open_checkpoint(Claimed(layers, 64), name="claimed")
    return planner.make(parsed, dict.fromkeys(parsed.repos, opened), limits=limits)


@pytest.mark.parametrize("times", [(600, 600), (600, 1), (30, 500)])
def test_a_text_that_multiplies_a_model_is_refused_before_its_tensors_are_built(times: tuple[int, int]) -> None:
    start = time.process_time()
    with pytest.raises(Refused, match="layers; the limit is 1,000") as caught:
        planned(repeated(*times))
    assert caught.value.code == "TOO_LARGE"
    assert time.process_time() - start < 2


def test_an_operator_may_ask_for_more_and_has_a_limit_too() -> None:
    few = dataclasses.replace(TRUSTED, layers=10_000)
    assert planned(repeated(30, 20), limits=few).layers == 1200
    with pytest.raises(Refused, match="limit is 10,000"):
        planned(repeated(300, 20), limits=few)
    with pytest.raises(Refused, match="limit is 100,000"):
        planned(repeated(500, 300), limits=TRUSTED)


def test_tensors_and_inputs_are_counted_and_named_when_they_are_too_many() -> None:
    text = repeated(3, 1)  # twice six layers of seven
    with pytest.raises(Refused, match="more than 41 tensors"):
        planned(text, limits=dataclasses.replace(UNTRUSTED, tensors=41))
    assert len(planned(text, limits=dataclasses.replace(UNTRUSTED, tensors=42)).steps) == 42
    visits = 14 + 42 + 42 + 42  # the model and its uses, the intermediate and its uses
    assert planned(text, limits=dataclasses.replace(UNTRUSTED, source_tensors=visits)).layers == 6
    with pytest.raises(Refused, match="tensors of sources"):
        planned(text, limits=dataclasses.replace(UNTRUSTED, source_tensors=visits - 1))


def test_models_of_126_layers_and_of_30_000_tensors_may_be_merged() -> None:
    sources = "\n".join(f"- {{model: own/m{i}, parameters: {{weight: 1}}}}" for i in range(2))
    deep = planned(f"merge_method: linear\nmodels:\n{sources}\n", layers=126)
    assert (deep.layers, len(deep.steps)) == (126, 126 * 7)
    wide = planned("merge_method: passthrough\nmodels: [{model: own/a}]\n", layers=4_286, limits=TRUSTED)
    assert len(wide.steps) == 30_002
    assert UNTRUSTED.tensors > 30_002


def test_thousands_of_tensors_outside_the_layers_are_placed_in_no_time(tmp_path: Path) -> None:
    tensors = llama_tensors(0)
    tensors |= {f"model.norm{i}.weight": torch.ones(1) for i in range(12_000)}
    save(tmp_path / "a", tensors)
    start = time.process_time()
    made, _ = plan_of("merge_method: passthrough\nmodels: [{model: a}]\n", tmp_path, limits=UNTRUSTED)
    assert len(made.steps) == len(tensors)
    assert time.process_time() - start < 5


def test_an_intermediate_larger_than_the_result_counts_in_disk_and_memory(tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(1))
    text = repeated(40, 1).replace("own/a", "a").replace("[0, 80]", "[0, 1]")
    made, _ = plan_of(text, tmp_path)
    (_, between), told = made.stages[0], summary.summary(made)
    assert between.bytes_out > 10 * made.bytes_out
    assert told["disk_bytes"] == between.disk_bytes + made.disk_bytes > between.bytes_out
    assert told["peak_memory_bytes"] == max(between.peak_memory_bytes, made.peak_memory_bytes)
    assert told["bytes_in"] == between.bytes_in + made.bytes_in


def with_ids(folder: Path, change: dict[str, Any], added: list[dict[str, Any]] | None = None) -> None:
    for seed, name in enumerate("ab"):
        model(folder / name, seed, SHARED)
    document = tokenizer(SHARED)
    document["model"]["vocab"] |= change
    document["added_tokens"] += added or []
    (folder / "b" / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize("bad", [10**13, 2**24, 10**30, -3, True, 3.0, "3", None, [1]])
@pytest.mark.parametrize("added", [False, True])
def test_a_token_id_that_is_no_small_whole_number_is_refused_by_source_and_token(
    bad: object, added: bool, tmp_path: Path
) -> None:
    entry = [{"id": bad, "content": "odd"}] if added else None
    with_ids(tmp_path, {} if added else {"odd": bad}, entry)
    for text in (UNION, UNION.replace("union", "model:b")):
        with pytest.raises(Refused) as caught:
            plan_of(text, tmp_path)
        assert caught.value.code == "BAD_CHECKPOINT"
        assert "b: tokenizer.json gives 'odd' the id " in caught.value.message


def test_an_id_far_beyond_the_embedding_is_refused_and_one_a_little_beyond_is_not(tmp_path: Path) -> None:
    with_ids(tmp_path, {"odd": 2 * 16 + 65_537})
    text = UNION.replace("union", "model:b")
    with pytest.raises(Refused, match="the embedding has 16 rows"):
        plan_of(text, tmp_path)
    with_ids(tmp_path, {"odd": 20})
    assert plan_of(text, tmp_path)[0].vocabulary.rows == 21  # type: ignore[union-attr]


@pytest.mark.parametrize("empty", [{}, []])
def test_a_vocabulary_without_tokens_is_refused(empty: object, tmp_path: Path) -> None:
    with_ids(tmp_path, {})
    document = {"model": {"vocab": empty}}
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(Refused, match="names no token"):
        plan_of(UNION, tmp_path)


@pytest.mark.parametrize("vocabulary", ["null", "true", "7", "1e999", "NaN", '"text"', "[1e999]"])
def test_a_vocabulary_of_another_kind_is_refused(vocabulary: str, tmp_path: Path) -> None:
    with_ids(tmp_path, {})
    (tmp_path / "b" / "tokenizer.json").write_text(f'{{"model": {{"vocab": {vocabulary}}}}}')
    with pytest.raises(Refused) as caught:
        plan_of(UNION, tmp_path)
    assert caught.value.code == "BAD_CHECKPOINT" and "tokenizer.json" in caught.value.message


@pytest.mark.parametrize("row", ["-1", "1e15", "16777216"])
def test_a_row_number_that_no_matrix_has_is_refused_with_its_path(row: str) -> None:
    source = f"{{kind: model_token, model: own/a, token_id: {row}}}"
    text = (
        f"merge_method: passthrough\nmodels: [{{model: own/a}}]\ntokenizer: {{tokens: {{x: {{source: {source}}}}}}}\n"
    )
    with pytest.raises(Refused, match="token_id") as caught:
        recipe.parse(text, trust="stranger")
    assert caught.value.code == "VALUE_OUT_OF_RANGE"


def test_a_key_as_long_as_the_recipe_gets_its_hint_in_no_time() -> None:
    start = time.process_time()
    assert nearest("merge_methud", ["merge_method", "models"]) == "Did you mean `merge_method`?"
    assert nearest("merge_method" * 5_000, ["merge_method", "models" * 5_000]).startswith("Valid here")
    assert time.process_time() - start < 1


class _Counted(TensorView):
    """Counts the reads and the longest of them."""

    reads, longest = 0, 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.reads += 1
        self.longest = max(self.longest, stop - start)
        return super().read(start, stop)


def test_rows_in_any_order_are_read_many_at_a_time_and_never_more_than_the_piece() -> None:
    count, width, piece = 20_000, 8, 2_000
    draw = np.random.default_rng(0)
    stored = [torch.randn(count, width), torch.randn(count, width)]
    own = draw.permutation(count)
    own[::5] = -1
    lacking = np.flatnonzero(own < 0)
    taken = draw.integers(0, count, (len(lacking), 2))
    views = [_Counted(matrix, torch.float32) for matrix in stored]
    row_map = RowMap(own, (Fill(lacking, (0, 1), taken),), lacking[:0])
    gathered = GatheredView(row_map, 0, views, torch.float32)
    found = torch.cat([gathered.read(at, at + piece * width).clone() for at in range(0, count * width, piece * width)])
    expected = stored[0][torch.from_numpy(own)]
    sums = sum(stored[i][torch.from_numpy(taken[:, i])].double() for i in range(2))
    expected[torch.from_numpy(lacking)] = (sums / 2).float()  # type: ignore[operator,union-attr]
    assert torch.equal(found.view(count, width), expected)
    assert sum(view.reads for view in views) < 1_000
    assert max(view.longest for view in views) <= piece * width


def test_factors_of_more_dimensions_than_the_weight_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "base", llama_tensors(0))
    name = "base_model.model.model.layers.0.self_attn.q_proj."
    folder = tmp_path / "adapter"
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
    text = "merge_method: passthrough\nmodels: [{model: base+adapter}]\n"

    def refused(a: tuple[int, ...], b: tuple[int, ...], magnitude: tuple[int, ...] | None = None) -> Refused:
        tensors = {f"{name}lora_A.weight": torch.ones(a), f"{name}lora_B.weight": torch.ones(b)}
        if magnitude is not None:
            tensors[f"{name}lora_magnitude_vector"] = torch.ones(magnitude)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**told, "use_dora": magnitude is not None}))
        with pytest.raises(Refused) as caught:
            plan_of(text, tmp_path)
        return caught.value

    for error in (
        refused((2, 8), (8, 2, 3)),
        refused((2, 4, 2), (8, 2)),
        refused((2, 8, 1), (8, 2)),
        refused((2, 8), (8, 2), (2, 4)),
    ):
        assert error.code == "SHAPE_MISMATCH"
