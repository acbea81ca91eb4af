"""`mergebot verify`: an honest merge is confirmed byte for byte, and every way to falsify one is named."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bot.errors import Refused
from bot.hub import Hub
from bot.localhub import seed
from bot.merge.execution.options import MergeOptions
from bot.merge.recipe import reading as recipe
from bot.settings import Settings
from bot.stages import local_runs
from bot.stages.verification import Verdict
from tests.localhub.server import REPO, RunningHub, running_hub
from tests.merge.tiny_checkpoints import llama_tensors, save

# The library itself passes uploads to its transport in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
RECIPE = """merge_method: ties
base_model: {0}/base
models:
- {{model: {0}/left, parameters: {{weight: 1, density: 0.5}}}}
- {{model: {0}/right, parameters: {{weight: 0.5, density: 0.5}}}}
dtype: bfloat16
"""


def quiet(what: str, done: float, total: float) -> None:
    """Progress nobody looks at."""


def merge(
    asked: recipe.Recipe, out: Path, settings: Settings, *, device: str = "cpu", hash_sources: bool = False
) -> None:
    """Plan and merge as the command does."""
    planned = local_runs.plan_from_headers(asked, settings)
    local_runs.merge(planned, out, settings, quiet, MergeOptions(device=device), hash_sources=hash_sources)


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Settings, Path]:
    """A merge of three local folders."""
    for number, name in enumerate(("base", "left", "right")):
        save(tmp_path / "models" / name, llama_tensors(number), shards=2)
    settings = Settings(home=tmp_path / "bot", hub="http://127.0.0.1:9", device="cpu")
    asked = recipe.parse(RECIPE.format(tmp_path / "models"))
    merge(asked, tmp_path / "out", settings, hash_sources=True)
    return settings, tmp_path / "out"


def verdict(merged: tuple[Settings, Path]) -> Verdict:
    settings, out = merged
    found = local_runs.verify(str(out), settings, quiet, device="cpu")
    assert not list(settings.scratch.glob("verify-*"))
    return found


def writable(file: Path) -> Path:
    file.chmod(0o644)
    return file


def rewritten_provenance(out: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    file = writable(out / "merge_provenance.json")
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def test_an_honest_merge_is_confirmed(merged: tuple[Settings, Path]) -> None:
    found = verdict(merged)
    assert found.differences == () and found.remarks == ()
    assert found.tensors == 21 and "byte for byte" in found.sentence


def test_a_merge_of_another_version_is_compared_all_the_same(merged: tuple[Settings, Path]) -> None:
    path = merged[1] / "merge_provenance.json"
    told = json.loads(path.read_text())
    told["engine"]["numerics"], told["plan_digest"] = 1, "0" * 64
    path.chmod(0o644)
    path.write_text(json.dumps(told))
    found = verdict(merged)
    assert found.differences == () and "numerics version 1" in found.remarks[0]


def test_without_hashes_a_changed_source_is_told_as_possible(merged: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, _ = merged
    asked = recipe.parse(RECIPE.format(tmp_path / "models"))
    merge(asked, tmp_path / "plain", settings)
    assert verdict((settings, tmp_path / "plain")).remarks == ()
    shard = tmp_path / "models" / "left" / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x40
    shard.write_bytes(content)
    found = verdict((settings, tmp_path / "plain"))
    assert found.differences and "were not recorded" in found.remarks[-1]
    assert all(f"models/{name}" in found.remarks[-1] for name in ("base", "left", "right"))


def test_provenance_names_every_source_file_by_hash_when_asked(merged: tuple[Settings, Path]) -> None:
    told = json.loads((merged[1] / "merge_provenance.json").read_text())
    assert len(told["sources"]) == 3
    for source in told["sources"]:
        assert source["files"]
        for name, fact in source["files"].items():
            assert name.endswith(".safetensors") and fact["verified"] == "sha256"
            assert len(fact["sha256"]) == len(fact["header_sha256"]) == 64


def test_a_flipped_bit_is_found_and_its_tensor_named(merged: tuple[Settings, Path]) -> None:
    file = writable(merged[1] / "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    found = verdict(merged)
    tensors = [each for each in found.differences if each.what == "tensor"]
    assert [(each.elements, each.ulps) for each in tensors] == [(1, 1)]
    assert any(each.what == "file" and each.name == "model.safetensors" for each in found.differences)


def test_swapped_tensors_are_found_though_the_provenance_was_adapted(merged: tuple[Settings, Path]) -> None:
    from bot.merge.checkpoints.checkpoint import LocalFiles
    from bot.merge.execution.verify import hash_of

    file = writable(merged[1] / "model.safetensors")
    tensors = load_file(file)
    one, other = (f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj"))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, file, {"format": "pt"})
    digest = hash_of(LocalFiles(merged[1]), "model.safetensors")
    rewritten_provenance(merged[1], lambda told: told["outputs"]["model.safetensors"].update(sha256=digest))
    found = verdict(merged)
    assert {each.name for each in found.differences if each.what == "tensor"} == {one, other}
    assert {each.name for each in found.differences if each.what != "tensor"} <= {"model.safetensors"}


def test_a_shard_that_cannot_be_read_is_named_once_and_not_by_each_of_its_tensors(
    merged: tuple[Settings, Path],
) -> None:
    with writable(merged[1] / "model.safetensors").open("ab") as shard:
        shard.write(b"x")
    found = verdict(merged)
    assert {(each.what, each.name) for each in found.differences} == {("file", "model.safetensors")}
    (merged[1] / "model.safetensors").unlink()
    found = verdict(merged)
    assert [each.sentence for each in found.differences] == ["model.safetensors is missing."]


@pytest.mark.parametrize("name", ["config.json", "mergekit_config.yml"])
def test_an_edited_text_is_found(merged: tuple[Settings, Path], name: str) -> None:
    file = writable(merged[1] / name)
    file.write_text(file.read_text().replace("0.5", "0.6") + "\n")
    found = verdict(merged)
    assert {(each.what, each.name) for each in found.differences} == {("file", name), ("config", name)}


def test_honest_bytes_under_another_name_do_not_hide_a_tampered_shard(merged: tuple[Settings, Path]) -> None:
    file = writable(merged[1] / "model.safetensors")
    content = bytearray(file.read_bytes())
    (merged[1] / "model_zzz.safetensors").write_bytes(content)
    content[-1] ^= 1
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewritten_provenance(merged[1], lambda told: told["outputs"]["model.safetensors"].update(sha256=digest))
    found = verdict(merged)
    assert [each.what for each in found.differences].count("tensor") == 1
    assert "model_zzz.safetensors" in {each.name for each in found.differences}


def test_a_shard_with_another_header_is_found(merged: tuple[Settings, Path]) -> None:
    file = writable(merged[1] / "model.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    changed = content[8 : 8 + length].replace(b'"pt"', b'"tf"')
    assert changed != content[8 : 8 + length]
    content = content[:8] + changed + content[8 + length :]
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewritten_provenance(merged[1], lambda told: told["outputs"]["model.safetensors"].update(sha256=digest))
    assert [each.name for each in verdict(merged).differences] == ["model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["extra.safetensors", "pytorch_model.bin", "weights.pt", "modeling_x.py", "adapter_config.json",
     "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json",
     "additional_chat_templates/tool.jinja"],
)  # fmt: skip
def test_a_file_that_the_merge_does_not_write_is_found(merged: tuple[Settings, Path], name: str) -> None:
    (merged[1] / name).parent.mkdir(exist_ok=True)
    (merged[1] / name).write_text("{}")
    assert [each.name.rstrip("/") for each in verdict(merged).differences] == [name.partition("/")[0]]


def test_what_the_publisher_and_people_put_beside_a_merge_is_no_difference(merged: tuple[Settings, Path]) -> None:
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".mergebot.json", "results/lm_eval.json",
                 "results/decode_speed.json", "medusa/heads.safetensors", ".git/config"):  # fmt: skip
        (merged[1] / name).parent.mkdir(exist_ok=True)
        (merged[1] / name).write_text("{}")
    assert verdict(merged).differences == ()


@pytest.mark.parametrize("name", ["config.json", "mergekit_config.yml", "model.safetensors"])
def test_a_missing_file_is_found_though_the_provenance_was_adapted(merged: tuple[Settings, Path], name: str) -> None:
    (merged[1] / name).unlink()
    rewritten_provenance(merged[1], lambda told: told["outputs"].pop(name, None))
    assert f"{name} is missing." in {each.sentence for each in verdict(merged).differences}


@pytest.mark.parametrize("name", ["config.json", "mergekit_config.yml", "model.safetensors"])
def test_a_file_of_a_terabyte_is_named_and_not_read(merged: tuple[Settings, Path], name: str) -> None:
    with writable(merged[1] / name).open("r+b") as stream:
        stream.truncate(2**40)
    assert name in {each.name for each in verdict(merged).differences}


def test_two_verifications_at_once_leave_each_other_alone(merged: tuple[Settings, Path], tmp_path: Path) -> None:
    """The second runs from beginning to end while the first is at work."""
    settings, out = merged
    inner: list[Verdict] = []
    scratches: list[set[Path]] = []

    def second(what: str, done: float, total: float) -> None:
        if not inner and what.startswith("Merging") and list(settings.scratch.glob("verify-*")):
            before = set(settings.scratch.glob("verify-*"))
            inner.append(verdict_beside(settings, out))
            scratches.append(before & set(settings.scratch.glob("verify-*")))

    assert local_runs.verify(str(out), settings, second, device="cpu").differences == ()
    assert inner[0].differences == () and len(scratches[0]) == 1
    assert not list(settings.scratch.glob("verify-*"))


def verdict_beside(settings: Settings, out: Path) -> Verdict:
    return local_runs.verify(str(out), settings, quiet, device="cpu")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda told: told["outputs"].pop("model.safetensors"), "model.safetensors"),
        (lambda told: told["tensors"].update(merged=1), "tensors"),
        (lambda told: told["tokenizer"].update(policy="union"), "tokenizer"),
    ],
)
def test_a_provenance_that_tells_less_or_otherwise_is_found(
    merged: tuple[Settings, Path],
    change: Callable[[dict], object],  # type: ignore[type-arg]
    name: str,
) -> None:
    rewritten_provenance(merged[1], change)
    assert [(each.what, each.name) for each in verdict(merged).differences] == [("provenance", name)]


def test_a_provenance_of_a_version_to_come_is_refused(merged: tuple[Settings, Path]) -> None:
    rewritten_provenance(merged[1], lambda told: told["engine"].update(numerics=99))
    with pytest.raises(Refused, match="newer mergebot"):
        verdict(merged)


def test_code_among_the_results_is_found(merged: tuple[Settings, Path]) -> None:
    (merged[1] / "results").mkdir()
    (merged[1] / "results.py").write_text("1")
    assert [each.name for each in verdict(merged).differences] == ["results.py"]


def test_a_forged_recipe_is_found(merged: tuple[Settings, Path]) -> None:
    def forge(told: dict) -> None:  # type: ignore[type-arg]
        told["recipe"]["canonical"]["models"][1]["parameters"]["weight"] = 0.25

    rewritten_provenance(merged[1], forge)
    found = verdict(merged)
    assert {"recipe", "plan", "tensor"} <= {each.what for each in found.differences}


def test_forged_sources_are_found(merged: tuple[Settings, Path], tmp_path: Path) -> None:
    def forge(told: dict) -> None:  # type: ignore[type-arg]
        left, right = (told["sources"][i]["files"] for i in (0, 1))
        for name in left:
            left[name], right[name] = right[name], left[name]

    rewritten_provenance(merged[1], forge)
    with pytest.raises(Refused) as caught:
        verdict(merged)
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE"


def test_a_source_that_changed_or_went_is_named(merged: tuple[Settings, Path], tmp_path: Path) -> None:
    left = tmp_path / "models" / "left"
    shard = left / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Refused) as changed:
        verdict(merged)
    assert changed.value.code == "SOURCE_CHANGED_OR_GONE" and "model-00001-of-00002" in changed.value.message
    left.rename(tmp_path / "models" / "elsewhere")
    with pytest.raises(Refused) as gone:
        verdict(merged)
    assert gone.value.code == "SOURCE_CHANGED_OR_GONE" and "left" in gone.value.message


def test_without_a_provenance_or_with_nonsense_there_is_nothing_to_verify(
    merged: tuple[Settings, Path], tmp_path: Path
) -> None:
    for spoil in (
        lambda told: told.clear(),
        lambda told: told.update(outputs=[]),
        lambda told: told.update(schema="another"),
        lambda told: told.update(seed=float("inf")),
        lambda told: told["outputs"]["config.json"].update(sha256="of another length"),
        lambda told: told["engine"].clear(),
        lambda told: told.update(sources=[{"ref": "a/b", "files": {"x": 1}}]),
    ):
        text = (merged[1] / "merge_provenance.json").read_text()
        rewritten_provenance(merged[1], spoil)
        with pytest.raises(Refused) as caught:
            verdict(merged)
        assert caught.value.code == "NOT_VERIFIABLE"
        (merged[1] / "merge_provenance.json").write_text(text)
    (merged[1] / "merge_provenance.json").unlink()
    with pytest.raises(Refused) as caught:
        verdict(merged)
    assert caught.value.code == "NOT_VERIFIABLE"


@pytest.mark.slow
def test_the_command_says_one_sentence_and_exits_with_1(merged: tuple[Settings, Path]) -> None:
    settings, out = merged
    command = [sys.executable, "-m", "bot.cli.main", "--home", str(settings.home), "verify", str(out), "--json"]
    honest = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert honest.returncode == 0 and json.loads(honest.stdout)["same"] is True, honest.stderr
    file = writable(out / "config.json")
    file.write_text(file.read_text() + " ")
    false = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert false.returncode == 1 and json.loads(false.stdout)["same"] is False
    assert len(false.stderr.strip().splitlines()) == 1 and "NOT_THE_SAME" in false.stderr


@pytest.fixture
def family(tmp_path: Path) -> Iterator[RunningHub]:
    content = tmp_path / "content" / "models" / "alice"
    for number, name in enumerate(("base", "left", "right")):
        save(content / name, llama_tensors(number))
    with running_hub(tmp_path / "hub") as running:
        seed(running.root, tmp_path / "content")
        yield running


@pytest.mark.slow
def test_a_repo_on_the_hub_is_verified_from_its_commits(family: RunningHub, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "bot", hub=family.url, device="cpu")
    out = tmp_path / "out"
    merge(recipe.parse(RECIPE.format("alice")), out, settings, hash_sources=True)
    hub = Hub(family.url, family.token_of("mergebot"))
    hub.create_private("mergebot/result")
    files: dict[str, bytes | Path] = {file.name: file for file in out.iterdir()}
    commit = hub.commit("mergebot/result", files, parent=hub.head("mergebot/result"), message="merged")
    hub.make_public("mergebot/result")
    anyone = Settings(home=tmp_path / "elsewhere", hub=family.url, device="cpu")
    assert local_runs.verify("mergebot/result", anyone, quiet, device="cpu").differences == ()
    told = json.loads((out / "merge_provenance.json").read_text())
    assert str(tmp_path) not in json.dumps(told)
    assert all(len(source["commit"]) == 40 for source in told["sources"])
    spoilt = bytearray((out / "model.safetensors").read_bytes())
    spoilt[-1] ^= 0x80
    hub.commit("mergebot/result", {"model.safetensors": bytes(spoilt)}, parent=commit, message="spoilt")
    found = local_runs.verify("mergebot/result", anyone, quiet, device="cpu").differences
    assert {each.what for each in found} == {"file", "tensor"}
    assert local_runs.verify(f"mergebot/result@{commit}", anyone, quiet, device="cpu").differences == ()
    local = json.dumps(told).replace("alice/left@" + told["sources"][0]["commit"], str(tmp_path / "content"))
    head = hub.head("mergebot/result")
    hub.commit("mergebot/result", {"merge_provenance.json": local.encode()}, parent=head, message="leads here")
    with pytest.raises(Refused) as caught:
        local_runs.verify("mergebot/result", anyone, quiet, device="cpu")
    assert caught.value.code == "NOT_VERIFIABLE"
