"""Merged Medusa heads: the recipe of the models, applied by the merge engine to the tensors of their heads.

Heads sit after the last layer, so `for_heads` rewrites the recipe: gradients over layers take their last value, the
last slice counts, and filters apply only where they name `lm_head`, which corresponds to a head's own projection. Task
vectors start at the base's heads or, if it has none, at untrained heads, which repeat the base.

    heads/medusa_lm_head.safetensors      {i}.{j}.linear.weight / .bias, {i}.{L}.weight, keep
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bot.errors import Refused
from bot.merge.methods import METHODS, Base
from bot.merge.recipe.spec import (
    Condition,
    Conditions,
    Gradient,
    ModelRef,
    Module,
    Parameters,
    Recipe,
    Scalar,
    Setting,
    Slice,
    Source,
    Stage,
)
from bot.storage import sync_tree

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "medusa_lm_head.safetensors"
PROJECTION = "lm_head"
MOST_TOKENS = 1 << 21  # no vocabulary is larger
_MAIN_MODULES = ("default", "text_decoder", "language_model", "text_model", "decoder")
_BLOCK = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.linear\.(weight|bias)")
_OWN = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.weight")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


@dataclass(frozen=True, slots=True)
class _Heads:
    """A set of heads as tensors. `projections` is empty for heads that share the model's own."""

    blocks: Mapping[tuple[int, int, str], Tensor]  # (head, block, weight or bias) -> [H, H or 2H] or [H]
    projections: Mapping[int, Tensor]  # head -> [V', H]
    keep: Tensor | None

    @property
    def count(self) -> int:
        return 1 + max(head for head, _, _ in self.blocks)

    @property
    def shape(self) -> dict[str, object]:
        """Properties that must be equal in two sets of heads before they are merged, by name."""
        first = self.blocks[0, 0, "weight"].shape
        return {
            "kind": "own" if self.projections else "shared",
            "number of blocks a head": 1 + max(block for _, block, _ in self.blocks),
            "hidden size": first[0],
            "conditioning": "on the next token" if first[1] == 2 * first[0] else "none",
            "rows of the projections": self.projections[0].shape[0] if self.projections else None,
        }


def merge(
    asked: Recipe,
    heads: Mapping[ModelRef, Path],
    out: Path,
    *,
    models: Mapping[ModelRef, Path] | None = None,
    seed: int = 0,
) -> Path:
    """Merge the heads in the folders `heads`, by source of the recipe, into the new folder `out`; returns it.

    `models` are folders of the sources. Only the base's is read, and only if heads with their own projections start
    from untrained ones. Computed in float64 and stored in float32, so that equal heads stay equal bit for bit, whatever
    their weights. Raises Refused NOT_SUPPORTED with the reason if heads are missing or do not match.
    """
    recipe = for_heads(asked)
    found = {_one(ref): _read(folder) for ref, folder in heads.items()}
    wanted = recipe.repos
    for ref in wanted:
        if ref not in found:
            found[ref] = found.get(_without_adapter(ref, asked)) or _untrained(ref, recipe, found, models or {})
    taking_part = {ref: found[ref] for ref in wanted}
    _require_alike(taking_part)
    count = min(each.count for each in taking_part.values())
    keep = _draft_vocabulary(list(taking_part.values()))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=_made(out.parent)) as scratch:
        folders = {
            ref: _staged(each, count, Path(scratch) / f"source-{number}")
            for number, (ref, each) in enumerate(taking_part.items())
        }
        made = _carry_out(recipe, folders, Path(scratch) / "merged", seed)
        _write(made, keep, Path(scratch) / "heads", asked)
        (Path(scratch) / "heads").rename(out)
    return out


def for_heads(asked: Recipe) -> Recipe:
    """The recipe as it applies to tensors after the last layer. Raises Refused NOT_SUPPORTED."""
    if asked.classic is not None and asked.classic.layer_gradient:
        _refuse("the gradient over layers of the 2023 program says nothing of heads")
    modules = {module.name: module for module in asked.modules}
    main = next((modules[name] for name in _MAIN_MODULES if name in modules), asked.modules[-1])
    return replace(
        asked,
        modules=(_last_slice(main),),
        base=None if asked.base is None else _one(asked.base),
        parameters=_parameters(asked.parameters),
        dtype="float64",
        out_dtype=None,
        vocabulary=None,
        chat_template=None,
        modular=False,
        stages=tuple(Stage(stage.name, for_heads(stage.recipe)) for stage in asked.stages),
        original=None,
    )


def _last_slice(module: Module) -> Module:
    """Heads belong to whatever supplies the last layer."""
    last = module.slices[-1]
    sources = tuple(Source(_one(source.model), None, _parameters(source.parameters)) for source in last.sources)
    base = None if last.base is None else _one(last.base)
    return Module(
        "default", "models", (Slice(sources, base, _parameters(last.parameters)),), _parameters(module.parameters)
    )


def _parameters(parameters: Parameters) -> Parameters:
    rewritten = {name: _setting(setting) for name, setting in parameters.items()}
    return {name: setting for name, setting in rewritten.items() if setting is not None}


def _setting(setting: Setting) -> Setting | None:
    """Value of a parameter for the heads; None if none of its conditions applies to them."""
    if not isinstance(setting, Conditions):
        return _at_the_end(setting)
    items = tuple(
        Condition(None if item.filter is None else PROJECTION, _at_the_end(item.value))
        for item in setting.items
        if item.filter is None or item.filter in f"{PROJECTION}.weight"
    )
    return Conditions(items) if items else None


def _at_the_end(value: Scalar | Gradient) -> Scalar:
    return value.values[-1] if isinstance(value, Gradient) else value


def _one(ref: ModelRef) -> ModelRef:
    """A model with its adapter has one set of heads and is one source for the engine."""
    return ref if ref.lora is None else ModelRef(str(ref))


def _without_adapter(ref: ModelRef, asked: Recipe) -> ModelRef:
    named = (each for part in asked.documents for each in part.sources)
    return next((each.bare for each in named if _one(each) == ref), ref)


# -- what is there --------------------------------------------------------------------------------------------------


def _read(folder: Path) -> _Heads:
    """The heads in a folder, in float32."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        _refuse(f"{WEIGHTS} in {folder.name} cannot be read: {error}")
    if (odd := next((name for name, tensor in tensors.items() if not _is_plain(name, tensor)), None)) is not None:
        _refuse(f"{odd[:80]} in {folder.name} has a shape or a type that heads do not have")
    blocks = {(int(m[1]), int(m[2]), m[3]): t.float() for n, t in tensors.items() if (m := _BLOCK.fullmatch(n))}
    own = {int(m[1]): t.float() for n, t in tensors.items() if (m := _OWN.fullmatch(n))}
    heads, layers = {head for head, _, _ in blocks}, {block for _, block, _ in blocks}
    for head in heads:
        for block in layers:
            weight = blocks.get((head, block, "weight"))
            if weight is None:
                _refuse(f"the heads in {folder.name} lack {head}.{block}.linear.weight")
            blocks.setdefault((head, block, "bias"), weight.new_zeros(weight.shape[0]))
    if heads != set(range(len(heads))) or layers != set(range(len(layers))) or not heads or (own and set(own) != heads):
        _refuse(f"the heads in {folder.name} are not whole")
    return _Heads(blocks, own, tensors.get("keep"))


def _is_plain(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor of an untrusted file has the shape that its name promises."""
    if name == "keep":
        return tensor.ndim == 1 and not tensor.is_floating_point() and 0 < len(tensor) <= MOST_TOKENS
    block = _BLOCK.fullmatch(name)
    if block is None and _OWN.fullmatch(name) is None:
        return True
    return tensor.is_floating_point() and tensor.ndim == (1 if block is not None and block[3] == "bias" else 2)


def _untrained(
    ref: ModelRef, recipe: Recipe, found: Mapping[ModelRef, _Heads], models: Mapping[ModelRef, Path]
) -> _Heads:
    """Heads that repeat the base, the start of task vectors. Raises Refused if `ref` is not such a base."""
    parts = recipe.documents
    starts = [part for part in parts if _is_start(part, ref)]
    if not starts or not found:
        _refuse(f"there are no heads of {ref}")
    like = next(iter(found.values()))
    blocks = {key: tensor.new_zeros(tensor.shape) for key, tensor in like.blocks.items()}
    if not like.projections:
        return _Heads(blocks, {}, None)
    if like.keep is not None or ref not in models:
        _refuse(f"untrained heads of {ref} need the rows of its own output projection")
    return _Heads(blocks, dict.fromkeys(like.projections, _projection(models[ref])), None)


def _is_start(part: Recipe, ref: ModelRef) -> bool:
    """Return whether task vectors start at `ref`; the base of slerp is one of its two ends instead."""
    bases = (part.base, *(piece.base for module in part.modules for piece in module.slices))
    return ref in bases and METHODS[part.method].base is not Base.IGNORED and part.method != "slerp"


def _projection(folder: Path) -> Tensor:
    """Output projection of a model [V, H] in float32: its own, or the tied embedding."""
    from safetensors import safe_open

    for pattern in (_HEAD, _EMBEDDING):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                name = next((name for name in file.keys() if pattern.search(name)), None)  # noqa: SIM118
                if name is not None:
                    rows: Tensor = file.get_tensor(name).float()
                    return rows
    _refuse(f"{folder.name} has no output projection")


def _require_alike(found: Mapping[ModelRef, _Heads]) -> None:
    (first, reference), *others = found.items()
    for ref, each in others:
        for name, value in reference.shape.items():
            if each.shape[name] != value:
                _refuse(f"the heads differ in {name}: {first} has {value}, {ref} has {each.shape[name]}")
        if reference.projections and (each.keep is None) != (reference.keep is None):
            _refuse(f"only one of {first} and {ref} has heads with a draft vocabulary of its own")
        if reference.projections and each.keep is not None and each.keep.tolist() != reference.keep.tolist():  # type: ignore[union-attr]
            _refuse(f"the heads of {first} and {ref} have projections onto different draft vocabularies")


def _draft_vocabulary(found: Iterable[_Heads]) -> list[int] | None:
    """The token ids the merged heads may draft: whatever any of the trained sets knew."""
    kept = [each.keep.tolist() for each in found if each.keep is not None]
    return list(dict.fromkeys(token for ids in kept for token in ids)) if kept else None


# -- through the engine ---------------------------------------------------------------------------------------------


def _staged(heads: _Heads, count: int, folder: Path) -> Path:
    """The first `count` heads as a checkpoint: a stack of `count` layers, each with its blocks and its lm_head."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {f"heads.{i}.block_{j}.{kind}": t for (i, j, kind), t in heads.blocks.items() if i < count}
    tensors |= {f"heads.{i}.{PROJECTION}.weight": t for i, t in heads.projections.items() if i < count}
    save_file({name: tensor.double().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "medusa_heads", "num_hidden_layers": count, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _carry_out(recipe: Recipe, folders: Mapping[ModelRef, Path], out: Path, seed: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from bot.merge.checkpoints.checkpoint import LocalFiles
    from bot.merge.checkpoints.lora import open_source
    from bot.merge.execution import stages
    from bot.merge.planning import planner

    made = planner.make(recipe, {ref: open_source(LocalFiles(folder)) for ref, folder in folders.items()}, seed=seed)
    stages.merge(made, folders, out)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _write(made: Mapping[str, Tensor], keep: list[int] | None, folder: Path, asked: Recipe) -> None:
    """The merged tensors under the names and with the config that head files have."""
    import torch
    from safetensors.torch import save_file

    names = [name.split(".") for name in made]
    blocks = {(int(i), int(part.removeprefix("block_"))) for _, i, part, _ in names if part != PROJECTION}
    layers, own = 1 + max(j for _, j in blocks), any(part == PROJECTION for _, _, part, _ in names)
    tensors = {}
    for name, tensor in ((name, tensor.float()) for name, tensor in made.items()):
        _, head, part, kind = name.split(".")
        block = part.removeprefix("block_")
        tensors[f"{head}.{layers}.weight" if part == PROJECTION else f"{head}.{block}.linear.{kind}"] = tensor
    if keep is not None:
        tensors["keep"] = torch.tensor(keep)
    width, entering = made["heads.0.block_0.weight"].shape
    config = {
        "medusa_num_heads": 1 + max(i for i, _ in blocks),
        "medusa_num_layers": layers,
        "version": "1" if own else "2",
        "mergebot_heads": {
            "kind": "own" if own else "shared", "conditioned": entering == 2 * width, "keep": keep is not None,
        },
        "merged": {"method": asked.method, "recipe": asked.digest},
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sync_tree(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse(reason: str) -> NoReturn:
    raise Refused("NOT_SUPPORTED", f"The heads cannot be merged: {reason}.", "Train heads on the merged model.")
