"""Checkpoints to measure on: made tensor by tensor, so that memory stays small, and the same bytes every time.

base             llama-shaped, normal weights with standard deviation 0.02, bfloat16
parent_1, _2 ... base + a tenth of each tensor's standard deviation of noise
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHARD_BYTES = 1_000_000_000
PIECE = 2**22  # elements made at a time
NOISE = 0.1  # of a tensor's standard deviation
Progress = Callable[[str], None]
Entries = Mapping[str, tuple[int, ...]]
Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a llama."""

    layers: int = 22
    hidden: int = 2048
    inner: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in tensors_of(self).values())


LARGE = Shape()  # 1,100,048,384 parameters in 201 tensors
SEVENTY = Shape(80, 8192, 28672, 64, 8, 32000)
WIDE = Shape(1, 8192, 64, 64, 1, 244_141)  # its embedding is one tensor of 4.0 GB


def shape_of(parameters: int) -> Shape:
    """A llama of roughly that many parameters; exactly `LARGE` at its size or above."""
    if parameters >= LARGE.parameters:
        return LARGE
    ratio = parameters / LARGE.parameters
    hidden = 256 * max(1, round(8 * math.sqrt(ratio)))
    return Shape(22, hidden, hidden * 11 // 4, hidden // 64, 4, max(512, 64 * round(500 * ratio)))


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order in which they are stored."""
    head = shape.hidden // shape.heads
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        out[f"{layer}input_layernorm.weight"] = (shape.hidden,)
        out[f"{layer}self_attn.q_proj.weight"] = (shape.hidden, shape.hidden)
        out[f"{layer}self_attn.k_proj.weight"] = (shape.kv_heads * head, shape.hidden)
        out[f"{layer}self_attn.v_proj.weight"] = (shape.kv_heads * head, shape.hidden)
        out[f"{layer}self_attn.o_proj.weight"] = (shape.hidden, shape.hidden)
        out[f"{layer}post_attention_layernorm.weight"] = (shape.hidden,)
        out[f"{layer}mlp.gate_proj.weight"] = (shape.inner, shape.hidden)
        out[f"{layer}mlp.up_proj.weight"] = (shape.inner, shape.hidden)
        out[f"{layer}mlp.down_proj.weight"] = (shape.hidden, shape.inner)
    out["model.norm.weight"] = (shape.hidden,)
    if shape is not WIDE:  # one large tensor is what that shape is for
        out["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return out


def synthetic(cache: Path, shape: Shape, parents: int, progress: Progress) -> list[Path]:
    """Folders of the base and its parents under `cache`, made where they are missing."""
    name = f"llama-{shape.parameters}"
    base = made_once(cache / name / "base", lambda folder: _random(folder, shape), progress)
    return [base, *_parents(base, cache / name, parents, progress)]


def real(cache: Path, parents: int, progress: Progress) -> list[Path]:
    """The demo's base model of 135 M parameters and perturbed copies of it."""
    from bot.demo import base

    built = base.build(cache)
    return [built, *_parents(built, cache / f"{built.name}-parents", parents, progress)]


def headers_only(cache: Path, shape: Shape, count: int) -> list[Path]:
    """Checkpoints with true headers whose weights are holes in the file: what planning reads, at any size."""

    def make(folder: Path) -> None:
        for file, head, size in _shards(folder, tensors_of(shape)):
            with file.open("wb") as shard:
                shard.write(head)
                shard.truncate(len(head) + size)
        _write_texts(folder, shape)

    name = f"headers-{shape.parameters}"
    return [made_once(cache / name / f"model_{i}", make, lambda _: None) for i in range(count)]


def made_once(target: Path, make: Callable[[Path], None], progress: Progress) -> Path:
    """Make a folder beside its place and rename it: whole or absent."""
    if target.is_dir():
        return target
    progress(f"making {target.parent.name}/{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        make(folder)
        os.sync()
        folder.rename(target)
    return target


def _parents(base: Path, into: Path, count: int, progress: Progress) -> list[Path]:
    def make(seed: int) -> Callable[[Path], None]:
        return lambda folder: _perturbed(base, folder, seed)

    return [made_once(into / f"parent_{i}", make(i), progress) for i in range(1, count + 1)]


def _shards(folder: Path, entries: Entries, limit: int = SHARD_BYTES) -> Iterator[tuple[Path, bytes, int]]:
    """File, header (length and JSON) and data bytes of each shard of a bfloat16 checkpoint; writes the index."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in entries.items():
        size = 2 * math.prod(shape)
        if used and used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
    total = sum(2 * math.prod(shape) for shape in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, group in zip(names, groups, strict=True):
        at = 0
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, shape in group.items():
            end = at + 2 * math.prod(shape)
            described[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps(described).encode()
        raw += b" " * (-len(raw) % 8)
        yield folder / file, len(raw).to_bytes(8, "little") + raw, at


def _random(folder: Path, shape: Shape) -> None:
    entries = tensors_of(shape)
    for file, head, _ in _shards(folder, entries):
        with file.open("wb") as shard:
            shard.write(head)
            for name in _names(head):
                count = math.prod(entries[name])
                draw = np.random.Generator(np.random.SFC64([0, zlib.crc32(name.encode())]))
                norm = name.endswith("norm.weight")
                for start in range(0, count, PIECE):
                    values = draw.standard_normal(min(PIECE, count - start), dtype=np.float32)
                    values *= 0.02
                    if norm:
                        values += 1
                    shard.write(to_bfloat16(values).data)
    _write_texts(folder, shape)


def _perturbed(base: Path, folder: Path, seed: int) -> None:
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
            continue
        with path.open("rb") as source, (folder / path.name).open("wb") as target:
            length = source.read(8)
            head = length + source.read(int.from_bytes(length, "little"))
            target.write(head)
            for name, entry in sorted(_described(head).items(), key=lambda item: item[1]["data_offsets"][0]):
                assert entry["dtype"] == "BF16", f"{name} is not bfloat16"
                draw = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
                left, scale = math.prod(entry["shape"]), 0.0
                while left:
                    stored = np.frombuffer(source.read(2 * min(PIECE, left)), dtype=np.uint16)
                    values = (stored.astype(np.uint32) << 16).view(np.float32)
                    scale = scale or NOISE * float(values.std())
                    noise = draw.standard_normal(len(values), dtype=np.float32) * np.float32(scale)
                    target.write(to_bfloat16(values + noise).data)
                    left -= len(values)


def to_bfloat16(values: npt.NDArray[np.float32]) -> Bits:
    """Finite float32 -> the bits of bfloat16, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _described(head: bytes) -> dict[str, Any]:
    return {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}


def _names(head: bytes) -> list[str]:
    return list(_described(head))


def _write_texts(folder: Path, shape: Shape) -> None:
    """Config and tokenizer: words w0, w1 ... after the three special tokens."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape is WIDE,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(shape.vocabulary)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**named, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048})
    )


def _tokenizer(vocabulary: int) -> dict[str, object]:
    special = ("<unk>", "<s>", "</s>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = [*special, *(f"w{i}" for i in range(vocabulary - len(special)))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "decoder": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"id": i, "content": word, **flags} for i, word in enumerate(special)],
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
