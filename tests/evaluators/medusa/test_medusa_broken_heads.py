"""Head files that are broken, hostile or for another model: refused with a sentence, and nothing in them is run."""

from __future__ import annotations

import itertools
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_heads import CUT, DEEP, OWN, SHARED, refusal
from torch import Tensor

from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.model.causal_lm import Base

logits = tiny.draft_logits


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny.base("gqa")


def pickled(base: Base, folder: Path, change: Callable[[dict[str, Any]], Any] = lambda tensors: tensors) -> Heads:
    """V1 heads as the reference saves them."""
    heads = tiny.random_heads(base, OWN)
    formats.save(heads, folder, "v1")
    tensors = load_file(folder / formats.WEIGHTS)
    (folder / formats.WEIGHTS).unlink()
    torch.save(change(tensors), folder / "medusa_lm_head.pt")
    return heads


def test_the_pickled_file_of_the_reference_is_read_as_tensors_only(base: Base, tmp_path: Path) -> None:
    heads = pickled(base, tmp_path)
    again, _ = formats.load(tmp_path, base)
    assert torch.equal(logits(again, base), logits(heads, base))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path(__file__).touch(); raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: torch.save({"0.0.linear.weight": Bomb()}, path), "which is not a tensor"),
        (lambda path: path.write_bytes(pickle.dumps({"0.0.linear.weight": 1})), "not the zip archive"),
        (lambda path: torch.save([1, 2], path), "no dictionary of tensors"),
        (lambda path: torch.save({"0.0.linear.weight": "text"}, path), "holds str"),
    ],
)  # fmt: skip
def test_nothing_in_a_pickled_file_is_run(
    base: Base, tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    write(tmp_path / "medusa_lm_head.pt")
    error = refusal(lambda: formats.load(tmp_path, base))
    assert error.code == "BAD_HEADS" and words in error.message


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("spec", "change", "words"),
    [
        (OWN, lambda t: t.update({"0.1.weight": t["0.1.weight"][:-3].clone()}), ("297", "300")),
        (SHARED, lambda t: t.update({"0.0.linear.weight": torch.zeros(8, 8)}), ("32", "8")),
        (OWN, lambda t: t.pop("1.1.weight"), ("1.1.weight",)),
        (SHARED, lambda t: t.pop("1.0.linear.weight"), ("1",)),
        (SHARED, lambda t: t["0.0.linear.weight"].fill_(float("nan")), ("0.0.linear.weight",)),
        (SHARED, lambda t: t.update({"0.0.linear.weight": t["0.0.linear.weight"].long()}), ("0.0.linear.weight",)),
        (CUT, lambda t: t["keep"].fill_(300), ("300",)),
    ],
)
def test_heads_that_do_not_fit_are_refused_with_the_reason(
    base: Base, tmp_path: Path, spec: HeadSpec, change: Change, words: tuple[str, ...]
) -> None:
    formats.save(tiny.random_heads(base, spec), tmp_path)
    tensors = load_file(tmp_path / formats.WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / formats.WEIGHTS)
    error = refusal(lambda: formats.load(tmp_path, base))
    assert error.code in ("BAD_HEADS", "SPEED_CHECK_FAILED") and all(word in str(error.message) for word in words)


@pytest.mark.parametrize("head", [b"", b"\xff" * 8 + b"{}", (10**15).to_bytes(8, "little"), (90).to_bytes(8, "little")])
def test_a_broken_file_is_refused(base: Base, tmp_path: Path, head: bytes) -> None:
    (tmp_path / formats.WEIGHTS).write_bytes(head)
    assert refusal(lambda: formats.load(tmp_path, base)).code == "BAD_HEADS"


def test_a_huge_header_a_truncated_file_and_a_truncated_archive_are_named_as_such(base: Base, tmp_path: Path) -> None:
    (tmp_path / formats.WEIGHTS).write_bytes((10**15).to_bytes(8, "little"))
    assert "declares a header of 1,000,000,000,000,000 bytes" in refusal(lambda: formats.load(tmp_path, base)).message
    formats.save(tiny.random_heads(base, SHARED), tmp_path)
    whole = (tmp_path / formats.WEIGHTS).read_bytes()
    for length in (4, 60, len(whole) - 1):
        (tmp_path / formats.WEIGHTS).write_bytes(whole[:length])
        assert "not a whole safetensors file" in refusal(lambda: formats.load(tmp_path, base)).message
    pickled(base, tmp_path / "v1")
    archive = tmp_path / "v1" / "medusa_lm_head.pt"
    archive.write_bytes(archive.read_bytes()[:-40])
    assert "truncated or broken zip" in refusal(lambda: formats.load(tmp_path / "v1", base)).message


def repacked(path: Path, compress: int = zipfile.ZIP_STORED, **added: bytes) -> None:
    """The same archive, packed anew."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in (parts | {f"archive/{name}.pkl": data for name, data in added.items()}).items():
            archive.writestr(name, data)


def test_an_archive_that_unpacks_to_more_or_holds_a_second_table_is_not_opened(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "medusa_lm_head.pt"
    pickled(base, tmp_path)
    repacked(path, zipfile.ZIP_DEFLATED)
    assert "would unpack to more" in refusal(lambda: formats.load(tmp_path, base)).message
    path.unlink()
    pickled(base, tmp_path / "two")
    repacked(tmp_path / "two" / path.name, second=b"cos\nsystem\n(S'true'\ntR.")
    assert "exactly one small dictionary" in refusal(lambda: formats.load(tmp_path / "two", base)).message


def test_a_tensor_that_describes_more_numbers_than_it_holds_is_refused(base: Base, tmp_path: Path) -> None:
    pickled(base, tmp_path, lambda tensors: {**tensors, "0.0.linear.weight": torch.zeros(1, 1).expand(32, 32)})
    assert "describes more values" in refusal(lambda: formats.load(tmp_path, base)).message


def test_tied_blocks_of_a_pickled_file_share_one_storage_and_still_become_two(base: Base, tmp_path: Path) -> None:
    def tied(tensors: dict[str, Any]) -> dict[str, Any]:
        deep = {f"{head}.2.weight": tensors[f"{head}.1.weight"] for head in (0, 1)}
        for head, index, part in itertools.product((0, 1), (0, 1), ("weight", "bias")):
            deep[f"{head}.{index}.linear.{part}"] = tensors[f"{head}.0.linear.{part}"]
        return deep

    pickled(base, tmp_path, tied)
    heads, warnings = formats.load(tmp_path, base)
    assert heads.spec.layers == 2 and any("are equal" in warning for warning in warnings)
    assert torch.equal(heads.first.data, heads.more.data[:, 0])


def test_a_file_in_two_layouts_is_refused(base: Base, tmp_path: Path) -> None:
    formats.save(tiny.random_heads(base, SHARED), tmp_path)
    tensors = load_file(tmp_path / formats.WEIGHTS)
    save_file({**tensors, "blocks.0.layers.0.weight": torch.zeros(32, 32)}, tmp_path / formats.WEIGHTS)
    assert "mixes the names" in refusal(lambda: formats.load(tmp_path, base)).message


@given(
    st.binary(max_size=400), st.sampled_from(["medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors"])
)
@settings(max_examples=60, deadline=None)
def test_bytes_of_any_kind_are_refused_with_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for start in (b"", b"PK\x03\x04", (len(data) or 1).to_bytes(8, "little")):
        (folder / name).write_bytes(start + data)
        error = refusal(lambda: formats.load(folder, tiny.base("gqa")))
        assert error.code == "BAD_HEADS" and error.message.count("\n") == 0 and error.next_step


@pytest.fixture(scope="module")
def whole_files(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """A head file of every layout: its name and its bytes."""
    found = []
    for fmt, spec in (("ours", CUT), ("v1", OWN), ("v2", DEEP), ("vllm", CUT)):
        folder = tmp_path_factory.mktemp("whole")
        formats.save(tiny.random_heads(base, spec), folder, fmt)  # type: ignore[arg-type]
        (file,) = folder.glob("*.safetensors")
        found.append((file.name, file.read_bytes()))
        if fmt == "v1":
            torch.save(load_file(file), folder / "medusa_lm_head.pt")
            found.append(("medusa_lm_head.pt", (folder / "medusa_lm_head.pt").read_bytes()))
    return found


@given(st.integers(0, 4), st.randoms(use_true_random=False))
@settings(max_examples=120, deadline=None)
def test_a_file_with_some_bytes_changed_is_read_or_refused_with_a_sentence(
    whole_files: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory, number: int, draw: Random
) -> None:
    name, whole = whole_files[number]
    data = bytearray(whole)
    head = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else 3000
    for _ in range(draw.choice((1, 2, 5))):
        tail = len(data) - 1 - draw.randrange(2500)
        data[draw.choice((draw.randrange(head), draw.randrange(head), tail))] = draw.choice(
            b'0123456789{}[]",:. FI\x00\xff'
        )
    folder = tmp_path_factory.mktemp("changed")
    (folder / name).write_bytes(data[: draw.choice((len(data), len(data), len(data) - 7))])
    try:
        heads, _ = formats.load(folder, tiny.base("gqa"))
    except EvaluationError as error:
        assert error.code == "BAD_HEADS" and "\n" not in error.message and error.next_step
    else:
        assert all(bool(parameter.isfinite().all()) for parameter in heads.parameters())


def test_an_empty_folder_and_a_pickled_model_are_refused(base: Base, tmp_path: Path) -> None:
    assert "no medusa_lm_head.safetensors" in refusal(lambda: formats.load(tmp_path, base)).message
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refusal(lambda: formats.load(tmp_path, base)).message
