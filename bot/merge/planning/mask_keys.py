"""Keys of the random masks. docs/design/merging.md 1.7.

A key depends on the purpose of the draw only, so masks are the same for any thread count, chunk size, shard layout,
model order, device or interruption.
"""

from __future__ import annotations

import hashlib


def mask_key(seed: int, model: str, tensor: str) -> int:
    """64-bit key of the stream for the delta of `model` (pinned reference) in the output tensor `tensor`."""
    text = "\0".join(("mask/1", str(seed), model, tensor)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
