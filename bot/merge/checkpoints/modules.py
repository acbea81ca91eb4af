"""Modules of a model with several stacks: their layers, loose tensors and names.

A stack is identified by the first part of its name that no other stack shares: `language_model.` and `vision_tower.`,
or `encoder.` and `decoder.`. What stands outside of all (a projector, a shared embedding) is a module without layers.
docs/design/merging.md 1.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from bot.errors import Refused, Where
from bot.merge.checkpoints.architecture import Architecture, Stack, stored_bytes
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.tensor_names import AUDIO, VISION
from bot.merge.checkpoints.ties import is_head

Kind = Literal["vision", "audio", "text", "encoder", "decoder", "projector", "shared", "other"]
_WORDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("vision", VISION),
    ("audio", AUDIO),
    ("text", re.compile(r"text|language|llm")),
    ("encoder", re.compile(r"encoder")),
    ("decoder", re.compile(r"decoder")),
    ("projector", re.compile(r"projector|connector|merger|aligner|adapter")),
    ("shared", re.compile(r"shared")),
)
# names in the wild, whatever the model itself calls the module; the first names one without a name
_CALLED: Mapping[Kind, tuple[str, ...]] = {
    "vision": ("vision_tower", "vision_model", "vision_encoder", "visual", "vision", "image_encoder"),
    "audio": ("audio_tower", "audio_model", "audio_encoder", "audio"),
    "text": ("text_decoder", "language_model", "text_model", "llm", "text", "default"),
    "encoder": ("encoder", "text_encoder"),
    "decoder": ("decoder", "text_decoder"),
    "projector": ("multi_modal_projector", "mm_projector", "projector", "connector"),
    "shared": ("shared",),
    "other": (),
}
_DEPTH = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth")
_COUNTS = 0.02  # share of the bytes from which a stack without a descriptive name counts as a module of its own


@dataclass(frozen=True, slots=True)
class Part:
    """One module of a model: its layers, the loose tensors before and after them, the config's keys for its depth."""

    name: str
    kind: Kind
    components: frozenset[str]  # parts of its tensors' names that no other module has
    stack: Stack | None
    others: tuple[Stack, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    depths: tuple[tuple[str, ...], ...]

    def of(self, whole: Architecture) -> Architecture:
        """The model as if this module were all of it."""
        main = self.stack or Stack(whole.main.prefix, ())
        return replace(whole, main=main, others=self.others, before=self.before, after=self.after)


def parts(checkpoint: Checkpoint, whole: Architecture) -> tuple[Part, ...]:
    """The modules of a model, at least one; those with layers first."""
    stacks = _counting(checkpoint, whole)
    if len(stacks) == 1:
        paths = () if whole.depth_key is None else (whole.depth_key,)
        text = Part("default", "text", frozenset(), whole.main, whole.others, whole.before, whole.after, paths)
        return (text,)
    roots = {kind: _root(stack, list(stacks.values())) for kind, stack in stacks.items()}
    owner = _owners(whole, stacks, roots)
    out = [_part(checkpoint, kind, key, stacks.get(kind), whole, owner) for kind, key in _keys(stacks, roots, owner)]
    return tuple(_named(out))


def layered(modules: Iterable[Part]) -> tuple[Part, ...]:
    """The modules that have layers."""
    return tuple(part for part in modules if part.stack is not None)


def find(modules: Sequence[Part], name: str) -> Part | None:
    """The one module that `name` means: its own name, a part of its tensors' names, or a name used in the wild."""
    tests = (
        lambda part: name == part.name,
        lambda part: name in part.components,
        lambda part: name in _CALLED[part.kind],
    )
    for test in tests:
        hits = [part for part in modules if test(part)]
        if len(hits) == 1:
            return hits[0]
    return None


def require(modules: Sequence[Part], name: str, model: str) -> Part:
    """As `find`; refused with the names there are."""
    part = find(modules, name)
    if part is None:
        names = ", ".join(f"`{each.name}`" for each in modules)
        message, where = f"{model} has no module `{name[:60]}`.", Where("recipe", None, f"modules.{name[:60]}")
        raise Refused("RECIPE_INVALID", message, f"Its modules are {names}.", value=name, where=where)
    return part


def counterpart(part: Part, modules: Sequence[Part]) -> Part | None:
    """The module of another model of the same family that corresponds to `part`."""
    same = [each for each in modules if each.kind == part.kind and (each.stack is None) == (part.stack is None)]
    if len(same) > 1:
        same = [each for each in same if each.name == part.name]
    return same[0] if same else None


def with_loose(part: Part, extra: Iterable[Part]) -> Part:
    """`part` with the tensors of modules without layers put before its own layers."""
    return replace(part, before=(*(name for each in extra for name in (*each.before, *each.after)), *part.before))


def _kind(text: str) -> Kind:
    return next((kind for kind, words in _WORDS if words.search(text)), "other")


def _counting(checkpoint: Checkpoint, whole: Architecture) -> dict[str, Stack]:
    """The heaviest stack of every kind, by kind; a stack of no known kind if it is heavy."""

    weight = partial(stored_bytes, checkpoint)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    kind_of_main = _kind(whole.main.prefix)
    out: dict[str, Stack] = {"text" if kind_of_main == "other" else kind_of_main: whole.main}
    for stack in sorted(whole.others, key=weight, reverse=True):
        kind: str = _kind(stack.prefix)
        heavy = weight(stack) > _COUNTS * total
        if kind in ("projector", "shared") or (kind == "other" and not heavy):
            continue
        outer = [other.prefix for other in out.values() if other.prefix != stack.prefix]
        inside = any(stack.prefix.startswith(prefix) for prefix in outer)
        if not inside:
            out.setdefault(stack.prefix if kind == "other" else kind, stack)
    return out


def _root(stack: Stack, stacks: Sequence[Stack]) -> str:
    """The shortest leading part of a stack's name that no other stack has."""
    words = stack.prefix.rstrip(".").split(".")
    for count in range(1, len(words) + 1):
        root = ".".join(words[:count]) + "."
        if not any(other is not stack and other.prefix.startswith(root) for other in stacks):
            return root
    return stack.prefix


def _owners(whole: Architecture, stacks: Mapping[str, Stack], roots: Mapping[str, str]) -> dict[str, str]:
    """Loose tensor -> key of the module it belongs to: a kind that has layers, else its own leading name."""
    shared = _common(list(roots.values()))
    speaking = next((kind for kind in ("text", "decoder") if kind in stacks), next(iter(stacks)))
    in_stack = {name for stack in stacks.values() for layer in stack.layers for name in layer.values()}
    loose = [name for name in (*whole.before, *whole.after) if name not in in_stack]
    main = {name for layer in whole.main.layers for name in layer.values()}
    out: dict[str, str] = {}
    for name in (name for name in loose if name not in main):
        inside = next((kind for kind, root in roots.items() if name.startswith(root)), None)
        words = name.removeprefix(shared).split(".")
        alone = len(words) < 2 or is_head(name) or words[0] in ("lm_head", "embed_out")
        out[name] = inside or (speaking if alone else words[0])
    return out


def _common(roots: Sequence[str]) -> str:
    """The leading name that all roots share, without their last word: `model.` of `model.encoder.`."""
    words = [root.rstrip(".").split(".")[:-1] for root in roots]
    same = [column[0] for column in zip(*words, strict=False) if len(set(column)) == 1]
    return "".join(f"{word}." for word in same)


def _keys(stacks: Mapping[str, Stack], roots: Mapping[str, str], owner: Mapping[str, str]) -> list[tuple[str, str]]:
    """(kind or name, name) of every module."""
    rest = [key for key in dict.fromkeys(owner.values()) if key not in stacks]
    return [(kind, roots[kind].rstrip(".").split(".")[-1]) for kind in stacks] + [(key, key) for key in rest]


def _part(
    checkpoint: Checkpoint, key: str, name: str, stack: Stack | None, whole: Architecture, owner: Mapping[str, str]
) -> Part:
    kind: Kind = next((kind for kind in _CALLED if kind == key), _kind(name)) if stack is not None else _kind(name)
    own = {tensor for tensor, belongs in owner.items() if belongs == key}
    before = tuple(tensor for tensor in whole.before if tensor in own)
    after = tuple(tensor for tensor in whole.after if tensor in own)
    others = tuple(
        other
        for other in whole.others
        if other is not stack and other.layers and not own.isdisjoint(other.layers[0].values())
    )
    words = frozenset() if stack is None else frozenset(stack.prefix.rstrip(".").split("."))
    depths = () if stack is None else _depths(checkpoint.config, kind, len(stack.layers))
    return Part(name, kind, words, stack, others, before, after, depths)


def _named(modules: Sequence[Part]) -> Iterable[Part]:
    """Each with a descriptive name, and with the components that no other has."""
    for part in modules:
        elsewhere = {word for other in modules if other is not part for word in other.components}
        name = _CALLED[part.kind][0] if part.name == "model" and part.kind != "other" else part.name
        yield replace(part, name=name, components=part.components - elsewhere)


def _depths(config: Mapping[str, Any], kind: Kind, layers: int) -> tuple[tuple[str, ...], ...]:
    """Paths of the config's keys that count the layers of a module of `kind`."""
    inner = [((key,), part) for key, part in config.items() if isinstance(part, dict)]
    own = [
        (*path, key)
        for path, part in inner
        for key, value in part.items()
        if _kind(path[0]) == kind and _DEPTH.fullmatch(key) and value == layers
    ]
    if kind in ("vision", "audio") and inner:
        return tuple(own)
    top = [key for key, value in config.items() if _DEPTH.fullmatch(key) and isinstance(value, int)]
    foreign = {"encoder": "decoder", "decoder": "encoder"}.get(kind)
    keys = [key for key in top if foreign is None or foreign not in key]
    if kind == "decoder":
        named = [key for key in keys if "decoder" in key]
        # a config without a count of its own for the decoder means the encoder's
        keys = named or (["num_decoder_layers"] if keys else [])
    return (*own, *((key,) for key in keys if config.get(key, layers) == layers))
