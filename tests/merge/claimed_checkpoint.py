"""A checkpoint that exists as headers only, as the Hub shows it by byte ranges. Imports no torch."""

from __future__ import annotations

import json
from typing import Any


class Claimed:
    """`layers` layers of seven bfloat16 matrices of `width` x `width`; reading a weight is an error."""

    def __init__(self, layers: int, width: int) -> None:
        entries: dict[str, Any] = {}
        at = 0
        self.reads = 0
        for i in range(layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                size = 2 * width * width
                entries[f"model.layers.{i}.{name}.weight"] = {
                    "dtype": "BF16", "shape": [width, width], "data_offsets": [at, at + size],
                }  # fmt: skip
                at += size
        raw = json.dumps(entries).encode()
        self.head = len(raw).to_bytes(8, "little") + raw
        self.config = json.dumps({"num_hidden_layers": layers, "model_type": "llama"}).encode()
        self.size = len(self.head) + at

    def sizes(self) -> dict[str, int]:
        return {"config.json": len(self.config), "model.safetensors": self.size}

    def read(self, name: str, start: int, length: int) -> bytes:
        self.reads += 1
        content = self.config if name == "config.json" else self.head
        assert start < len(content), "planning must not read weights"
        return content[start : start + length]
