"""What strangers may send: each is refused from headers alone, by name, before a byte of weights moves."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bot.errors import MergebotError
from bot.hub import Hub
from bot.jobs.queue import Queue, open_queue
from bot.jobs.request import EvaluateOptions, from_form
from bot.localhub import seed
from bot.service import intake
from bot.service.scheduler import Scheduler
from bot.settings import Settings
from tests import family
from tests.localhub.server import RunningHub, running_hub

pytestmark = pytest.mark.slow
RECIPE = """merge_method: linear
models:
- {{model: alice/left, parameters: {{weight: 1}}}}
- {{model: {other}, parameters: {{weight: 1}}}}
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("attacks")
    with running_hub(folder / "hub") as running:
        content = folder / "content" / "models"
        family.make(content / "alice")
        for name, spoil in SPOILED.items():
            spoil(content / "mallory" / name)
        seed(running.root, folder / "content")
        yield running


def _copy(folder: Path, licence: str | None = "mit", config: dict[str, object] | None = None) -> Path:
    """A folder that is right in every way but the given ones."""
    shutil.copytree(folder.parent.parent / "alice" / "left", folder)
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "# no card data\n")
    if config is not None:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**whole, **config}))
    return folder


def pickled(folder: Path) -> None:
    (_copy(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = _copy(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def enormous(folder: Path) -> None:
    """A header that claims ten terabytes and a file that holds none of them."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**21, 2**20], "data_offsets": [0, 2**43]}}).encode()
    (_copy(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def leaving(folder: Path) -> None:
    (_copy(folder) / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../alice/left/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def header_bomb(folder: Path) -> None:
    (_copy(folder) / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")


SPOILED: dict[str, Callable[[Path], object]] = {
    "pickled": pickled,
    "truncated": truncated,
    "enormous": enormous,
    "leaving": leaving,
    "header-bomb": header_bomb,
    "remote-code": lambda folder: _copy(folder, config={"auto_map": {"AutoModel": "evil.Model"}}),
    "no-licence": lambda folder: _copy(folder, licence=None),
    "no-derivatives": lambda folder: _copy(folder, licence="cc-by-nd-4.0"),
    "other-shape": lambda folder: _spread(folder),
}


def _spread(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = _copy(folder) / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = torch.zeros(40, 48, dtype=torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})


def ask(hub: RunningHub, queue: Queue, settings: Settings, recipe: str) -> MergebotError:
    request = from_form("bob", recipe, "attack", EvaluateOptions(suite="none"))
    with pytest.raises(MergebotError) as refused:
        intake.take(request, Hub(hub.url), queue, settings)
    return refused.value


@pytest.mark.parametrize(
    ("other", "code", "named"),
    [
        ("mallory/pickled", "SOURCE_NOT_SAFETENSORS", "mallory/pickled"),
        ("mallory/truncated", "BAD_CHECKPOINT", "model.safetensors"),
        ("mallory/enormous", "BAD_CHECKPOINT", "model.safetensors"),
        ("mallory/leaving", "BAD_SHARD_NAME", ".."),
        ("mallory/header-bomb", "BAD_CHECKPOINT", "model.safetensors"),
        ("mallory/remote-code", "NEEDS_REMOTE_CODE", "mallory/remote-code"),
        ("mallory/no-licence", "LICENCE_CONFLICT", "mallory/no-licence"),
        ("mallory/no-derivatives", "LICENCE_CONFLICT", "mallory/no-derivatives"),
        ("mallory/other-shape", "SHAPE_MISMATCH", "down_proj"),
        ("mallory/absent", "SOURCE_NOT_FOUND", "mallory/absent"),
        ("/etc/passwd", "NOT_A_REPO_ID", "/etc/passwd"),
        ("../alice/left", "NOT_A_REPO_ID", "alice/left"),
        ("https://example.org/model", "NOT_A_REPO_ID", "example.org"),
    ],
)
def test_a_hostile_source_is_refused_by_name(
    other: str, code: str, named: str, tmp_path: Path, hub: RunningHub
) -> None:
    settings = Settings(home=tmp_path, hub=hub.url)
    queue = open_queue(settings)
    refused = ask(hub, queue, settings, RECIPE.format(other=other))
    assert refused.code == code
    assert named in str(refused)
    assert refused.next_step
    assert queue.jobs() == []


def test_a_gated_source_is_refused(tmp_path: Path, hub: RunningHub) -> None:
    hub.client("api.update_repo_settings('alice/right', gated='auto')", tmp_path / "client", "alice")
    settings = Settings(home=tmp_path, hub=hub.url)
    try:
        refused = ask(hub, open_queue(settings), settings, RECIPE.format(other="alice/right"))
        assert refused.code == "SOURCE_GATED"
    finally:
        hub.client("api.update_repo_settings('alice/right', gated=False)", tmp_path / "client", "alice")


def test_work_beyond_the_limits_is_refused_with_both_figures(tmp_path: Path, hub: RunningHub) -> None:
    settings = Settings(home=tmp_path, hub=hub.url, disk_limit_bytes=1000)
    refused = ask(hub, open_queue(settings), settings, RECIPE.format(other="alice/base"))
    assert refused.code == "TOO_LARGE"
    assert "limit" in str(refused)


def test_a_suite_that_does_not_exist_is_refused_with_the_nearest_name(tmp_path: Path, hub: RunningHub) -> None:
    settings = Settings(home=tmp_path, hub=hub.url)
    request = from_form("bob", RECIPE.format(other="alice/base"), "x", EvaluateOptions(suite="quik"))
    with pytest.raises(MergebotError, match="quick"):
        intake.take(request, Hub(hub.url), open_queue(settings), settings)


def test_a_chat_template_of_ones_own_is_refused_wherever_it_stands_and_a_named_one_is_taken(
    tmp_path: Path, hub: RunningHub
) -> None:
    settings = Settings(home=tmp_path, hub=hub.url)
    queue, text = open_queue(settings), RECIPE.format(other="alice/base")
    own = "chat_template: '{% for m in messages %}{{ m }}{% endfor %}'\n"
    stage = f"name: one\n{text}{own}---\n{RECIPE.format(other='one')}chat_template: auto\n"
    for hostile in (text + own, stage):
        refused = ask(hub, queue, settings, hostile)
        assert refused.code == "NOT_SUPPORTED"
        assert "`chatml`" in refused.next_step
    request = from_form("bob", text + "chat_template: chatml\n", "named", EvaluateOptions(suite="none"))
    assert intake.take(request, Hub(hub.url), queue, settings).recipe


def test_a_person_with_enough_at_work_waits(tmp_path: Path, hub: RunningHub) -> None:
    settings = Settings(home=tmp_path, hub=hub.url, open_requests_per_person=1)
    queue = open_queue(settings)
    first = from_form("bob", RECIPE.format(other="alice/base"), "first", EvaluateOptions(suite="none"))
    job = intake.take(first, Hub(hub.url), queue, settings)
    refused = ask(hub, queue, settings, RECIPE.format(other="alice/base").replace("weight: 1", "weight: 2"))
    assert refused.code == "LIMIT_REACHED"
    assert [found.id for found in queue.jobs()] == [job.id]


def test_one_strangers_card_does_not_shut_the_door_for_the_others(tmp_path: Path, hub: RunningHub) -> None:
    block = "mergebot:\n  version: 1\n  evaluate: {suite: none}\n  recipe:\n    merge_method: linear\n    models:\n"
    models = "".join(f"    - {{model: alice/{name}, parameters: {{weight: 1}}}}\n" for name in ("left", "right"))
    good = f"---\nlicense: mit\ntags: [mergebot]\n{block}{models}---\n".encode()
    cards = {
        "alice/aa-not-utf8": good + b"\xff",
        "alice/bb-no-block": b"---\ntags: [mergebot]\n---\n",
        "alice/zz-good": good,
    }
    for repo, text in cards.items():  # past the client, which would not send such bytes
        readme = tmp_path / "content" / "models" / repo / "README.md"
        readme.parent.mkdir(parents=True)
        readme.write_bytes(text)
    seed(hub.root, tmp_path / "content")
    scheduler = Scheduler(Settings(home=tmp_path / "bot", hub=hub.url))
    for _ in range(2):
        scheduler.poll()
    assert [job.request.repo for job in scheduler.queue.jobs()] == ["alice/zz-good"]
    refused = {request.repo: refusal["code"] for request, _, refusal in scheduler.queue.unanswered() if refusal}
    assert refused == {"alice/aa-not-utf8": "REQUEST_INVALID", "alice/bb-no-block": "CARD_NO_REQUEST"}
    scheduler.stop()
