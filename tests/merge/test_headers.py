"""Checkpoints are hostile until their headers have been read; what we accept, the safetensors library accepts too."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from tiny_checkpoints import llama_tensors, save

from bot.errors import MergebotError, Refused
from bot.merge.checkpoints.architecture import infer
from bot.merge.checkpoints.checkpoint import TRUSTED, UNTRUSTED, LocalFiles, open_checkpoint
from bot.merge.checkpoints.header import Limits, header_length, parse

INDEX = "model.safetensors.index.json"


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def ours_accepts(file: bytes) -> bool:
    """Whether both trusts' reader takes the file; the stranger's rules must be the narrower ones."""
    verdicts = []
    for limits in (TRUSTED, UNTRUSTED):
        try:
            length = header_length("f", file[:8], len(file), limits)
            parse("f", file[8 : 8 + length], len(file), limits)
            verdicts.append(True)
        except Refused as error:
            assert error.code == "BAD_CHECKPOINT"
            assert error.message.startswith("f ")
            verdicts.append(False)
    assert verdicts != [False, True]
    return verdicts[0]


def library_accepts(file: bytes) -> bool:
    try:
        deserialize(file)
    except SafetensorError:
        return False
    return True


def entry(dtype: str = "F32", shape: Any = (2,), start: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


GOOD = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", (3,), 8, 11)}


def test_a_sound_file_is_accepted_by_both() -> None:
    file = pack(GOOD, bytes(11))
    assert ours_accepts(file)
    assert library_accepts(file)


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "header longer than the file": pack(GOOD, bytes(11), length=10_000),
    "length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "truncated": pack(GOOD, bytes(5)),
    "trailing bytes": pack(GOOD, bytes(12)),
    "overlap": pack({"a": entry(), "b": entry("F32", (2,), 4, 12)}, bytes(12)),
    "hole": pack({"a": entry(), "b": entry("F32", (2,), 12, 20)}, bytes(20)),
    "duplicate key": pack(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "huge dimension with none": pack({"a": entry("F32", (0, 2**62), 0, 0)}),
    "shape overflow": pack({"a": entry("F32", (2**31, 2**31, 4), 0, 0)}),
    "no tensors": pack({"__metadata__": {}}),
    "not JSON": pack(b"{]", b""),
    "a list": pack(b"[]", b""),
    "deep": pack(b'{"a":' + b"[" * 100_000, b""),
    "negative offset": pack({"a": entry("F32", (2,), -8, 0)}, bytes(8)),
    "a fraction": pack(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8)),
    "true as size": pack(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1)),
    "unknown type": pack({"a": entry("F7")}, bytes(8)),
    "wrong size": pack({"a": entry("F64")}, bytes(8)),
    "extra key": pack({"a": {**entry(), "more": 1}}, bytes(8)),
    "metadata of numbers": pack({"__metadata__": {"x": 1}, "a": entry()}, bytes(8)),
    "much metadata": pack({"__metadata__": {"x": "y" * 70_000}, "a": entry()}, bytes(8)),
    "a name with a newline": pack({"a\nb": entry()}, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name: str) -> None:
    assert not ours_accepts(HOSTILE[name])


@pytest.mark.parametrize("name", ["../up", "<b>x</b>", "a b", "x" * 300])
def test_a_stranger_cannot_choose_odd_tensor_names(name: str) -> None:
    file = pack({name: entry()}, bytes(8))
    with pytest.raises(Refused):
        parse("f", file[8:-8], len(file), UNTRUSTED)


def test_a_header_bomb_of_empty_tensors_is_refused_quickly() -> None:
    raw = json.dumps({f"t{i}": entry("F32", (0,), 0, 0) for i in range(140_000)}).encode()[: 8 * 2**20]
    started = time.process_time()
    with pytest.raises(Refused, match="more than 50,000 tensors"):
        parse("f", raw + b"}", len(raw) + 9, UNTRUSTED)
    assert time.process_time() - started < 1.0
    with pytest.raises(Refused, match="limit is 8,388,608"):
        header_length("f", struct.pack("<Q", 80_000_000), 90_000_000, UNTRUSTED)


sizes = st.one_of(st.integers(-1, 5), st.sampled_from([2**31, 2**62, 2**64, 1.0, True, None, "2"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "BOOL", "F4", "", 3]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 24), min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)
headers = st.dictionaries(st.one_of(st.text(max_size=3), st.just("__metadata__")), entries | sizes, max_size=3)


@st.composite
def sound_files(draw: st.DrawFn) -> bytes:
    """Well-formed files, with spaces behind the header as other writers leave them."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.from_regex(r"[a-z.]{1,6}", fullmatch=True), unique=True, min_size=1, max_size=4)):
        dtype, width = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)]))
        shape = draw(st.lists(st.integers(1, 3), max_size=3))
        end = at + width * int(torch.tensor(shape).prod()) if shape else at + width
        header[name], at = entry(dtype, shape, at, end), end
    return pack(json.dumps(header).encode() + b" " * draw(st.integers(0, 9)), bytes(at))


@settings(max_examples=150)
@given(st.one_of(st.builds(pack, headers, st.binary(max_size=24)), st.binary(max_size=64)))
@example(pack(b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)))
@example(pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8)))
@example(pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\0\0', bytes(8)))
@example(pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\n', bytes(8)))
@example(pack(b'{"__metadata__":{"a":"\\ud800"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)))
def test_whatever_we_accept_the_library_accepts(file: bytes) -> None:
    if ours_accepts(file):
        assert library_accepts(file)


@settings(max_examples=100)
@given(sound_files(), st.data())
def test_a_changed_byte_is_never_accepted_by_us_alone(file: bytes, data: st.DataObject) -> None:
    assert ours_accepts(file)
    assert library_accepts(file)
    at = data.draw(st.integers(0, len(file) - 1))
    changed = file[:at] + bytes([data.draw(st.integers(0, 255))]) + file[at + 1 :]
    if ours_accepts(changed):
        assert library_accepts(changed)


def refusal(folder: Path, **options: Any) -> MergebotError:
    with pytest.raises(Refused) as caught:
        open_checkpoint(LocalFiles(folder), **options)
    assert str(folder) in caught.value.message
    return caught.value


def test_only_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "m", llama_tensors(0))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    error = refusal(tmp_path / "m")
    assert error.code == "SOURCE_NOT_SAFETENSORS"
    assert "pytorch_model.bin" in error.message


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "m", llama_tensors(0), shards=3)
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    error = refusal(tmp_path / "m")
    assert error.code == "BAD_CHECKPOINT"
    assert shard.name in error.message
    assert "truncated" in error.message


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", ".safetensors/x"]
)
def test_a_shard_name_that_leaves_the_folder_is_refused(shard: str, tmp_path: Path) -> None:
    save(tmp_path / "other", llama_tensors(0))
    save(tmp_path / "m", llama_tensors(0), shards=2)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    assert refusal(tmp_path / "m").code == "BAD_SHARD_NAME"


def test_a_link_out_of_the_folder_is_refused_but_the_hub_cache_is_read(tmp_path: Path) -> None:
    save(tmp_path / "other", llama_tensors(0))
    save(tmp_path / "m", llama_tensors(0))
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    assert refusal(tmp_path / "m").code == "BAD_SHARD_NAME"
    snapshot = tmp_path / "models--o--n" / "snapshots" / ("1" * 40)
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "other" / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert len(open_checkpoint(LocalFiles(snapshot)).tensors) == len(llama_tensors(0))


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for name, change in {
        "lacks": lambda index: index["weight_map"].update({"model.more.weight": "model-00001-of-00002.safetensors"}),
        "is not there": lambda index: index["weight_map"].update({"model.norm.weight": "gone.safetensors"}),
    }.items():
        folder = save(tmp_path / name, llama_tensors(0), shards=2)
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))
        error = refusal(folder)
        assert error.code == "BAD_CHECKPOINT"
        assert name in error.message


def test_a_wrong_total_size_stops_a_stranger_and_is_noted_for_the_operator(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (folder / INDEX).write_text(json.dumps(index))
    assert refusal(folder, limits=UNTRUSTED).code == "BAD_CHECKPOINT"
    assert len(open_checkpoint(LocalFiles(folder)).notices) == 1


def test_shards_without_index_and_repeated_tensors_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0), shards=2)
    (folder / INDEX).unlink()
    assert "no model.safetensors.index.json" in refusal(folder).message


@pytest.mark.parametrize(
    ("config", "code"),
    [({"quantization_config": {"quant_method": "gptq"}}, "NOT_SUPPORTED"), ({"auto_map": {}}, "NEEDS_REMOTE_CODE")],
)
def test_quantised_weights_and_remote_code_are_refused(config: dict[str, Any], code: str, tmp_path: Path) -> None:
    save(tmp_path / "m", llama_tensors(0), **config)
    assert refusal(tmp_path / "m", limits=UNTRUSTED).code == code


SENTENCES = {
    "seven bytes": "too short", "header longer than the file": "is truncated", "length of 2^63": "the limit is",
    "truncated": "is truncated", "trailing bytes": "bytes after its last tensor", "overlap": "overlap before `b`",
    "hole": "hole before `b`", "duplicate key": "describes `a` twice", "huge dimension with none": "shape out of range",
    "shape overflow": "shape out of range", "no tensors": "holds no tensors", "not JSON": "not JSON",
    "negative offset": "number out of range", "a fraction": "not whole", "true as size": "shape out of range",
    "unknown type": "`F7`", "wrong size": "where its shape needs 16", "extra key": "dtype, shape and data_offsets",
    "metadata of numbers": "metadata that is not text", "much metadata": "bytes of metadata",
    "a name with a newline": "the name `a\\nb`",
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("limits", [UNTRUSTED, TRUSTED], ids=["stranger", "operator"])
def test_every_hostile_header_gets_its_own_sentence(name: str, limits: Limits, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0))
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    error = refusal(folder, limits=limits)
    assert error.code == "BAD_CHECKPOINT"
    assert "model.safetensors" in error.message
    assert SENTENCES[name] in error.message
    assert error.next_step


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ("\x00", "not JSON"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "64 levels deep"),
        ('{"a": ' + "[" * 100_000, "not JSON"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"model_type": ["llama"]}', "model_type"),
        ('{"a": "' + "x" * (4 * 2**20) + '"}', "the limit is 4,194,304"),
        ('{"a": 1' + "0" * 5000 + "}", "not JSON"),
    ],
)
def test_a_hostile_config_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0))
    (folder / "config.json").write_text(text)
    for limits in (UNTRUSTED, TRUSTED):
        error = refusal(folder, limits=limits)
        assert error.code == "BAD_CHECKPOINT"
        assert "config.json" in error.message
        assert said in error.message


@pytest.mark.parametrize("layers", [0, -1, 3, 10**9, "2", None, 2.0, [2], True])
def test_a_config_that_lies_about_its_layers_is_refused_or_outvoted(layers: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0), num_hidden_layers=layers)
    opened = open_checkpoint(LocalFiles(folder), limits=UNTRUSTED)
    if isinstance(layers, int):
        with pytest.raises(Refused) as caught:
            infer(opened)
        assert caught.value.code == "TENSOR_MISSING"
    else:
        assert len(infer(opened).main.layers) == 2


def test_more_shards_than_any_model_has_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0), shards=2)
    weight_map = {f"t{i}": f"model-{i}.safetensors" for i in range(1001)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "1,001 shards" in refusal(folder, limits=UNTRUSTED).message


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path / "m").code == "NOT_SUPPORTED"
    with pytest.raises(Refused) as caught:
        LocalFiles(tmp_path / "nowhere")
    assert caught.value.code == "SOURCE_NOT_FOUND"
