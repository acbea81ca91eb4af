"""Where models come from: operators and strangers alike plan from remote headers and move only what the plan reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bot.errors import Failed, Refused
from bot.hub import Hub
from bot.jobs.job import Merge
from bot.jobs.request import EvaluateOptions
from bot.jobs.specs import MergeSpec
from bot.localhub import seed
from bot.merge.execution.options import MergeOptions
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.spec import ModelRef
from bot.service import intake
from bot.settings import Settings
from bot.stages import local_runs, sources, worker
from tests.localhub.server import RunningHub, running_hub
from tests.merge.tiny_checkpoints import HIDDEN, llama_tensors, save

pytestmark = pytest.mark.slow
Q = "model.layers.0.self_attn.q_proj"
CARD = "---\nlicense: {}\n---\n"
THROUGH_ADAPTER = """merge_method: linear
models:
- {model: alice/base+bob/tuned, parameters: {weight: 1}}
dtype: float32
"""
STAGED = """name: halves
merge_method: linear
models:
- {model: alice/base, parameters: {weight: 1}}
- {model: alice/left, parameters: {weight: 1}}
dtype: float32
---
merge_method: passthrough
slices:
- sources: [{model: halves, layer_range: [0, 1]}]
- sources: [{model: alice/base, layer_range: [0, 2]}]
dtype: float32
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("sources")
    content = folder / "content" / "models"
    for number, name in enumerate(("base", "left")):
        save(content / "alice" / name, llama_tensors(number))
        (content / "alice" / name / "README.md").write_text(CARD.format("mit"))
    (content / "alice" / "left" / "chat_template.jinja").write_text("{{ messages }}")
    adapter(content / "bob" / "tuned", "mit")
    adapter(content / "bob" / "unlicensed", None)
    save(content / "alice" / "deep", llama_tensors(0, layers=32, hidden=512), dtype=torch.bfloat16)
    (content / "alice" / "deep" / "README.md").write_text(CARD.format("mit"))
    with running_hub(folder / "hub") as running:
        seed(running.root, folder / "content")
        yield running


def adapter(folder: Path, licence: str | None) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(7)
    factors = {"lora_A": torch.randn(2, HIDDEN, generator=draw), "lora_B": torch.randn(HIDDEN, 2, generator=draw)}
    names = {f"base_model.model.{Q}.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "alice/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD.format(licence) if licence else "# no licence\n")


def settings_of(hub: RunningHub, home: Path) -> Settings:
    return Settings(home=home, hub=hub.url, device="cpu")


def quiet(what: str, done: float, total: float) -> None:
    """Progress nobody looks at."""


def merge(
    asked: recipe.Recipe, out: Path, settings: Settings, *, device: str = "cpu", hash_sources: bool = False
) -> None:
    """Plan and merge as the command does."""
    planned = local_runs.plan_from_headers(asked, settings)
    local_runs.merge(planned, out, settings, quiet, MergeOptions(device=device), hash_sources=hash_sources)


def work(hub: RunningHub, home: Path, text: str, **evaluate: Any) -> tuple[Merge, Path, intake.Checked]:
    """A stranger's request through intake and worker, as the scheduler hands it over."""
    settings = settings_of(hub, home)
    checked = intake.check(text, Hub(hub.url), settings)
    options = EvaluateOptions(**{"suite": "none", **evaluate})
    spec = MergeSpec(checked.recipe.canonical(), home / "out", 0, checked.sources, options)
    return worker.merge(spec, settings, quiet), home / "out", checked


def weights_of(hub: RunningHub, name: str) -> dict[str, torch.Tensor]:
    return load_file(hub.root.parent / "content" / "models" / name / "model.safetensors")


def moved(hub: RunningHub, since: int) -> int:
    return sum(entry["bytes"] for entry in hub.journal()[since:] if "/resolve/" in entry["path"])


def test_a_strangers_adapter_is_pinned_licensed_counted_and_merged(hub: RunningHub, tmp_path: Path) -> None:
    fact, out, checked = work(hub, tmp_path, THROUGH_ADAPTER)
    assert [(source.repo, source.adapter) for source in checked.sources] == [("alice/base", False), ("bob/tuned", True)]
    assert all(len(source.revision) == 40 and source.licence == "mit" for source in checked.sources)
    assert checked.sources[1].bytes == 2 * 2 * HIDDEN * 4
    tuned = load_file(hub.root.parent / "content/models/bob/tuned/adapter_model.safetensors")
    a, b = (tuned[f"base_model.model.{Q}.lora_{part}.weight"] for part in "AB")
    expected = weights_of(hub, "alice/base")
    expected[f"{Q}.weight"] += 2.0 * (b @ a)
    got = load_file(out / "model.safetensors")
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)
    told = json.loads((out / "merge_provenance.json").read_text())
    assert {source["ref"].partition("@")[0] for source in told["sources"]} == {"alice/base", "bob/tuned"}
    assert fact.files["merge_provenance.json"]
    verdict = local_runs.verify(str(out), settings_of(hub, tmp_path / "again"), quiet)
    assert verdict.differences == (), verdict.sentence


def test_an_adapter_without_a_licence_is_refused_by_name(hub: RunningHub, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        work(hub, tmp_path, THROUGH_ADAPTER.replace("bob/tuned", "bob/unlicensed"))
    assert caught.value.code == "LICENCE_CONFLICT" and "bob/unlicensed" in caught.value.message


def test_a_strangers_recipe_of_several_documents_is_merged_and_verified(hub: RunningHub, tmp_path: Path) -> None:
    _, out, checked = work(hub, tmp_path, STAGED)
    assert [source.repo for source in checked.sources] == ["alice/base", "alice/left"]
    base, left = (weights_of(hub, f"alice/{name}") for name in ("base", "left"))
    got = load_file(out / "model.safetensors")
    name = "self_attn.q_proj.weight"
    half = (base[f"model.layers.0.{name}"] + left[f"model.layers.0.{name}"]) / 2
    assert torch.allclose(got[f"model.layers.0.{name}"], half, atol=1e-6)
    assert torch.equal(got[f"model.layers.2.{name}"], base[f"model.layers.1.{name}"])
    assert [path.name for path in tmp_path.glob("*.stages")] == []
    assert all(path.stat().st_mode & 0o222 == 0 for path in out.iterdir()), "what is measured is what is published"
    verdict = local_runs.verify(str(out), settings_of(hub, tmp_path / "again"), quiet)
    assert verdict.differences == (), verdict.sentence


def test_a_template_that_is_left_out_is_told_and_intake_and_worker_plan_alike(hub: RunningHub, tmp_path: Path) -> None:
    text = "merge_method: passthrough\nmodels: [{model: alice/left}]\ndtype: float32\n"
    fact, out, checked = work(hub, tmp_path, text)
    assert "TEMPLATE_DROPPED" in {notice["code"] for notice in fact.notices}
    assert not (out / "chat_template.jinja").exists()
    told = json.loads((out / "merge_provenance.json").read_text())
    assert told["plan_digest"] == checked.plan["plan_digest"]
    assert local_runs.verify(str(out), settings_of(hub, tmp_path / "again"), quiet).differences == ()


def test_the_operators_own_merge_takes_the_template_along(hub: RunningHub, tmp_path: Path) -> None:
    text = "merge_method: passthrough\nmodels: [{model: alice/left}]\ndtype: float32\n"
    settings = settings_of(hub, tmp_path)
    merge(recipe.parse(text), tmp_path / "out", settings)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_only_what_is_read_moves_and_only_what_is_measured_comes_whole(hub: RunningHub, tmp_path: Path) -> None:
    text = """merge_method: passthrough
slices:
- sources: [{model: alice/deep, layer_range: [12, 20]}]
"""
    layer = 2 * (4 * 512 * 512 + 3 * 12 * 512 + 2 * 512)
    before = len(hub.journal())
    _, out, checked = work(hub, tmp_path / "alone", text)
    assert moved(hub, before) < 9 * layer
    told = json.loads((out / "merge_provenance.json").read_text())
    [files] = [source["files"] for source in told["sources"]]
    assert files["model.safetensors"]["verified"] == "ranges" and files["config.json"]["verified"] == "git"
    settings, [source] = settings_of(hub, tmp_path / "alone"), checked.sources
    assert not settings.source_folder(source.repo, source.revision).exists()
    before = len(hub.journal())
    _, out, _ = work(hub, tmp_path / "measured", text, suite="quick")
    settings = settings_of(hub, tmp_path / "measured")
    assert settings.source_folder(source.repo, source.revision).is_dir()
    assert not settings.parts_folder(source.repo, source.revision).exists()
    assert 32 * layer < moved(hub, before) < 33 * layer
    told = json.loads((out / "merge_provenance.json").read_text())
    assert told["sources"][0]["files"]["model.safetensors"]["verified"] == "sha256"


def test_parts_of_a_model_are_never_taken_for_the_model(hub: RunningHub, tmp_path: Path) -> None:
    settings = settings_of(hub, tmp_path)
    merge(recipe.parse(THROUGH_ADAPTER), tmp_path / "out", settings)
    [parts] = (settings.home / "cache" / "parts" / "alice" / "base").glob("[0-9a-f]*")
    for deed in (
        lambda: local_runs.model_folder(str(parts), settings, quiet),
        lambda: sources.local_folder(ModelRef(str(parts))),
        lambda: local_runs.verify(str(parts), settings, quiet),
    ):
        with pytest.raises(Refused) as caught:
            deed()
        assert caught.value.code == "SOURCE_NOT_FOUND" and "parts" in caught.value.message


def test_a_device_that_is_none_is_told_before_anything_is_downloaded(hub: RunningHub, tmp_path: Path) -> None:
    settings = settings_of(hub, tmp_path)
    with pytest.raises(Refused) as caught:
        merge(recipe.parse(THROUGH_ADAPTER), tmp_path / "out", settings, device="gpu")
    assert caught.value.code == "DEVICE_UNAVAILABLE"
    assert not (settings.home / "cache" / "parts").exists()


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "a/file.txt", "https://huggingface.co/a/b"])
def test_what_is_neither_folder_nor_repo_is_named_by_every_verb_that_takes_a_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.txt").write_text("")
    settings = Settings(home=tmp_path / "home", hub="http://127.0.0.1:9")
    for deed in (local_runs.verify, local_runs.model_folder):
        with pytest.raises(Refused) as caught:
            deed(name, settings, quiet)
        assert caught.value.code == "SOURCE_NOT_FOUND" and name in caught.value.message


def test_a_folder_that_is_not_there_is_named_and_no_hub_is_asked(tmp_path: Path) -> None:
    asked = recipe.parse(f"merge_method: linear\nmodels: [{{model: {tmp_path}/gone, parameters: {{weight: 1}}}}]")

    def unreachable() -> Hub:
        raise AssertionError("asked the Hub for a folder")

    with pytest.raises(Refused, match=f"no model folder {tmp_path}/gone"):
        sources.opened(asked, unreachable)


def test_a_folder_that_may_be_a_repo_is_told_as_both_when_the_hub_is_away(tmp_path: Path) -> None:
    waits: list[float] = []
    asked = recipe.parse("merge_method: linear\nmodels: [{model: parents/gone, parameters: {weight: 1}}]")
    with pytest.raises(Failed, match="no folder parents/gone here") as told:
        sources.opened(asked, lambda: Hub("http://127.0.0.1:9", sleep=waits.append))
    assert told.value.code == "HUB_UNAVAILABLE"


@pytest.mark.parametrize("model", ["x@y", "{model: {path: x@y, revision: null}}", "x@y+fine@tuned"])
def test_a_local_folder_may_have_an_at_sign_in_its_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x@y", llama_tensors(0))
    adapter(tmp_path / "fine@tuned", None)
    asked = recipe.parse(f"merge_method: passthrough\nmodels: [{{model: {model}}}]")
    seen = sources.opened(asked, lambda: pytest.fail("the Hub was asked"))
    assert {folder.name for folder in seen.folders.values()} == set(model.split("+")) if "+" in model else {"x@y"}
    assert recipe.from_canonical(seen.recipe.canonical()) == seen.recipe


@pytest.mark.parametrize("name", ["weights.safetensors", "parts/other.pt"])
def test_a_file_of_weights_is_no_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recipes of mergekit-pytorch name them, whether the file is there or not."""
    monkeypatch.chdir(tmp_path)
    asked = recipe.parse(f"merge_method: linear\nmodels: [{{model: {name}, parameters: {{weight: 1}}}}]")
    for _ in range(2):
        with pytest.raises(Refused, match="mergekit-pytorch"):
            sources.opened(asked, lambda: pytest.fail("the Hub was asked"))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
