"""Parts of tensor names that tell where a tensor belongs: layer numbers, and towers beside the text model."""

from __future__ import annotations

import re

LAYER = re.compile(r"(?:^|(?<=\.))(\d+)\.")
VISION = re.compile(r"vision|visual|image|(^|[._])vit([._]|$)")
AUDIO = re.compile(r"audio|speech")


def stack_of(name: str) -> str:
    """The part of a name before its first layer number, "" outside of layers."""
    match = LAYER.search(name)
    return name[: match.start()] if match else ""


def words(text: str) -> tuple[str, ...]:
    """The names in a text that separates them by spaces, for long tables."""
    return tuple(text.split())
