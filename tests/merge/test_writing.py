"""The output appears whole or not at all, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import llama_tensors, load, merge, plan_of, save
from transformers import AutoModelForCausalLM

from bot.errors import Failed, MergebotError, Refused
from bot.merge.execution import engine
from bot.merge.execution.options import MergeOptions

TIES = """
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5, density: 0.5}}
- {model: b, parameters: {weight: 0.7, density: 0.6}}
- {model: c, parameters: {weight: 0.2, density: 0.7}}
"""
LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(tmp_path / name, llama_tensors(seed, layers=3), shards=1 + seed % 2)
    return tmp_path


def test_a_merged_model_loads_in_transformers_and_is_the_average(models: Path) -> None:
    done = merge(LINEAR, models, models / "out", shard_limit_bytes=3000)
    assert "model.safetensors.index.json" in done.files
    model = AutoModelForCausalLM.from_pretrained(models / "out", dtype=torch.float32)
    want = {name: (x + 3 * load(models / "b")[name]) / 4 for name, x in load(models / "a").items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, want[name])
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_killed_anywhere_it_continues_and_ends_with_the_same_bytes(models: Path) -> None:
    (models / "recipe.yml").write_text(TIES)
    points = [f"merge.after_step:{k}" for k in (1, 2, 9, 18, 26, 30)]
    points += ["writer.after_journal:1", "writer.after_journal:2", "writer.before_rename:1"]
    runner = Path(__file__).parent / "killed_merges.py"
    done = subprocess.run(
        [sys.executable, str(runner), str(models), str(models / "recipe.yml"), *points],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(report["points"]) == len(points)
    for point, outcome in report["points"].items():
        assert outcome["signal"] == signal.SIGKILL, point
        assert not outcome["appeared"], point
        assert outcome["second"] == 0, point
        assert outcome["digests"] == report["whole"], point
    lines = [outcome["journal_lines"] for outcome in report["points"].values()]
    assert max(lines) > 1, "finished work is found in the journal"


def test_a_torn_journal_line_is_dropped(models: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, name: str) -> None:
        if done * 2 > total:
            raise Stop

    whole = merge(TIES, models, models / "whole")
    with pytest.raises(Stop):
        merge(TIES, models, models / "out", progress=stop, sync_bytes=1)
    journal = models / "out.partial" / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    again = merge(TIES, models, models / "out")
    assert again.files == whole.files


class Interrupted(Exception):
    pass


def interrupted(models: Path, name: str = "out") -> Path:
    """The partial folder of a merge that ended half-way, half of its tensors in the journal."""

    def stop(done: int, total: int, tensor: str) -> None:
        if done * 2 > total:
            raise Interrupted

    with pytest.raises(Interrupted):
        merge(TIES, models, models / name, progress=stop, sync_bytes=1)
    return models / f"{name}.partial"


def test_a_source_replaced_by_one_with_the_same_header_is_not_mixed_into_a_resumed_merge(models: Path) -> None:
    partial = interrupted(models)
    save(models / "b", llama_tensors(9, layers=3), shards=1)
    with pytest.raises(Refused) as caught:
        merge(TIES, models, models / "out")
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE"
    assert "b/model" in caught.value.message and f"Remove {partial}" in caught.value.next_step
    assert not (models / "out").exists()


def test_a_merge_begun_with_another_torch_is_not_continued(models: Path) -> None:
    journal = interrupted(models) / "journal"
    journal.write_bytes(journal.read_bytes().replace(f"torch-{torch.__version__}".encode(), b"torch-1.0"))
    with pytest.raises(Refused) as caught:
        merge(TIES, models, models / "out")
    assert caught.value.code == "OUTPUT_EXISTS"


def test_finished_tensors_that_were_lost_or_spoilt_are_computed_again(models: Path) -> None:
    whole = merge(TIES, models, models / "whole")
    partial = interrupted(models, "lost")
    (partial / "model.safetensors").unlink()
    assert merge(TIES, models, models / "lost").files == whole.files
    partial = interrupted(models, "spoilt")
    planned, _ = plan_of(TIES, models)
    first = json.loads((partial / "journal").read_bytes().splitlines()[1].rpartition(b" ")[0])["step"]
    content = bytearray((partial / "model.safetensors").read_bytes())
    content[planned.steps[first].offset] ^= 1
    (partial / "model.safetensors").write_bytes(content)
    assert merge(TIES, models, models / "spoilt").files == whole.files


def test_a_copied_file_that_grew_is_not_cut_to_its_planned_length(models: Path) -> None:
    (models / "base" / "tokenizer_config.json").write_text('{"x": 1}')
    planned, folders = plan_of(TIES, models)
    assert [copied.file for copied in planned.copies] == ["tokenizer_config.json"]
    (models / "base" / "tokenizer_config.json").write_text('{"x": 1, "longer": true}')
    with pytest.raises(Failed) as caught:
        engine.merge(planned, folders, models / "out")
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE" and "tokenizer_config.json" in caught.value.message
    planned, folders = plan_of(TIES, models)

    def rewrite(done: int, total: int, tensor: str) -> None:
        (models / "base" / "tokenizer_config.json").write_text('{"x": 2, "longer": true}')

    with pytest.raises(Failed) as caught:
        engine.merge(planned, folders, models / "out", MergeOptions(progress=rewrite))
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE" and "tokenizer_config.json" in caught.value.message
    assert not (models / "out").exists()


def test_a_partial_folder_of_another_merge_is_left_alone(models: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(TIES, models, models / "out", progress=stop)
    with pytest.raises(Refused) as caught:
        merge(LINEAR, models, models / "out")
    assert caught.value.code == "OUTPUT_EXISTS"
    with pytest.raises(Refused):
        merge(TIES, models, models / "out", seed=1)
    assert merge(TIES, models, models / "out").files


def test_an_existing_output_is_never_touched(models: Path) -> None:
    (models / "out").mkdir()
    (models / "out" / "mine.txt").write_text("precious")
    with pytest.raises(Refused) as caught:
        merge(LINEAR, models, models / "out")
    assert caught.value.code == "OUTPUT_EXISTS"
    assert [path.name for path in (models / "out").iterdir()] == ["mine.txt"]
    assert not (models / "out.partial").exists()


def test_two_processes_cannot_write_one_output(models: Path) -> None:
    planned, folders = plan_of(LINEAR, models)
    problems: list[MergebotError] = []

    def second(done: int, total: int, name: str) -> None:
        if not problems:
            with pytest.raises(Refused) as caught:
                engine.merge(planned, folders, models / "out")
            problems.append(caught.value)

    engine.merge(planned, folders, models / "out", MergeOptions(progress=second))
    assert [error.code for error in problems] == ["OUTPUT_EXISTS"]
    assert "another process" in problems[0].message


def test_a_full_disk_fails_in_one_sentence_and_can_be_continued(models: Path) -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from tiny_checkpoints import merge
from bot.errors import Failed
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    merge({TIES!r}, Path({str(models)!r}), Path({str(models / "out")!r}))
except Failed as error:
    print(error.code, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.startswith("DISK_FULL the disk filled up while writing out.partial")
    assert "Traceback" not in done.stderr
    assert not (models / "out").exists()
    assert merge(TIES, models, models / "out").files == merge(TIES, models, models / "whole").files


def test_more_than_the_whole_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = save(tmp_path / name, llama_tensors(0, layers=1))
        header: dict[str, Any] = {}
        at = 0
        with safe_open(folder / "model.safetensors", "pt") as stored:
            names = list(stored.keys())
        for tensor in names:
            header[tensor] = {"dtype": "BF16", "shape": [2**20, 2**19], "data_offsets": [at, at + 2**40]}
            at += 2**40
        raw = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(folder / "model.safetensors", 8 + len(raw) + at)  # sparse: takes no space
    planned, folders = plan_of(LINEAR, tmp_path)
    assert planned.bytes_out > 10e12
    with pytest.raises(Refused) as caught:
        engine.merge(planned, folders, tmp_path / "out")
    assert caught.value.code == "TOO_LARGE"
    assert "GB of disk" in caught.value.message
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_changed_after_planning_stops_the_merge(models: Path) -> None:
    planned, folders = plan_of(LINEAR, models)
    save(models / "b", llama_tensors(2, layers=3), dtype=torch.float64)
    with pytest.raises(Failed) as caught:
        engine.merge(planned, folders, models / "out")
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE"
    assert not (models / "out").exists()


def test_the_manifest_lists_every_file_and_the_provenance_tells_no_time(models: Path) -> None:
    (models / "a" / "tokenizer.json").write_text('{"x": 1}')
    (models / "a" / "pytorch_model.bin").write_bytes(b"pickle")
    (models / "a" / "evil.py").write_text("raise SystemExit")
    done = merge(LINEAR, models, models / "out")
    manifest = (models / "out" / "manifest.json").read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == done.manifest_id
    listed = {entry["path"]: entry["sha256"] for entry in json.loads(manifest)["files"]}
    present = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (models / "out").iterdir()}
    present.pop("manifest.json")
    assert listed == present
    assert {"tokenizer.json", "merge_provenance.json", "mergekit_config.yml"} <= set(listed)
    assert not {"pytorch_model.bin", "evil.py"} & set(listed)
    again = merge(LINEAR, models, models / "again")
    assert again.manifest_id == done.manifest_id


def test_the_written_recipe_makes_the_same_model_again(models: Path) -> None:
    merge(TIES, models, models / "out")
    text = (models / "out" / "mergekit_config.yml").read_text()
    assert plan_of(text, models)[0].digest == plan_of(TIES, models)[0].digest
    assert (models / "out" / "mergekit_config.original.yml").read_text() == TIES


def test_one_nan_stays_one_element_and_is_counted(models: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = llama_tensors(1, layers=3)
    tensors[name][2, 3] = torch.nan
    save(models / "a", tensors)
    for text in (LINEAR, TIES, "merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: 0.5}"):
        out = models / f"out-{len(list(models.iterdir()))}"
        done = merge(text, models, out)
        bad = ~load(out)[name].isfinite()
        assert bad.nonzero().tolist() == [[2, 3]]
        notice = next(notice for notice in done.notices if notice.code == "NOT_FINITE")
        assert (notice.count, name in notice.text, notice.text.startswith("a ")) == (1, True, True)
    with pytest.raises(Failed) as caught:
        merge(LINEAR, models, models / "strict", on_nonfinite="fail")
    assert caught.value.code == "NOT_FINITE"
    assert name in caught.value.message
    assert not (models / "strict").exists()


def test_sixty_thousand_in_half_precision_overflows_only_where_the_result_does(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        tensors = llama_tensors(seed)
        tensors["model.norm.weight"][0] = -6e4 if name == "base" else 6e4
        save(tmp_path / name, tensors, dtype=torch.float16)
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: %s}"
    merge(text % 0.5, tmp_path, tmp_path / "out")
    assert float(load(tmp_path / "out")["model.norm.weight"][0]) == torch.tensor(6e4).half()
    with pytest.raises(Failed) as caught:
        merge(text % 2, tmp_path, tmp_path / "over")
    assert (caught.value.code, caught.value.value) == ("NOT_FINITE", "model.norm.weight")


def test_tensors_that_are_not_floats_are_copied_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, {**llama_tensors(seed), "model.position_ids": torch.arange(4)})
    merge(LINEAR, tmp_path, tmp_path / "out")
    assert load(tmp_path / "out")["model.position_ids"].tolist() == [0, 1, 2, 3]
    save(tmp_path / "b", {**llama_tensors(1), "model.position_ids": torch.arange(1, 5)})
    with pytest.raises(Failed) as caught:
        merge(LINEAR, tmp_path, tmp_path / "other")
    assert caught.value.value == "model.position_ids"


def test_an_unknown_device_is_refused(models: Path) -> None:
    with pytest.raises(Refused) as caught:
        merge(LINEAR, models, models / "out", device="tpu")
    assert caught.value.code == "DEVICE_UNAVAILABLE"


def test_the_bytes_depend_neither_on_threads_nor_on_how_sources_are_sharded(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for seed, name in enumerate(("base", "a", "b")):
        tensors = llama_tensors(seed, layers=1)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(307, 257, generator=draw)
        save(tmp_path / name, tensors)
    texts = [
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.3}",
        "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]",
        "merge_method: dare_ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.7, density: 0.4}",
        "merge_method: della\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.7, density: 0.4}",
    ]
    before = torch.get_num_threads()
    try:
        for i, text in enumerate(texts):
            torch.set_num_threads(1)
            first = merge(text, tmp_path, tmp_path / f"{i}-1", threads=1)
            torch.set_num_threads(2)
            second = merge(text, tmp_path, tmp_path / f"{i}-2", threads=3)
            assert first.files == second.files
    finally:
        torch.set_num_threads(before)
    whole = load(tmp_path / "3-1")
    save(tmp_path / "a", load(tmp_path / "a"), shards=3)
    for seed in (0, 1):
        merge(texts[3], tmp_path, tmp_path / f"seed-{seed}", seed=seed)
        same = all(torch.equal(whole[name], tensor) for name, tensor in load(tmp_path / f"seed-{seed}").items())
        assert same is (seed == 0)
