"""Greedy generation with the Medusa heads that a model's repo carries. Needs torch, transformers and safetensors only.

    model.generate(**inputs, max_new_tokens=200, custom_generate="owner/name", trust_remote_code=True)

The text is that of plain greedy `generate`, token for token in float32: heads guess a small tree of tokens, one forward
pass checks all of them, and only what the model itself would have written is kept. In 16 bit a token computed among
others can round otherwise than alone, so that of two nearly equal tokens the other is taken. Whatever cannot be done
that way (sampling, beams, batches, padding, logits processors, caches that cannot hold a tree) is left to plain
`generate`, with one warning.

`medusa_heads`: a repo or folder to take the heads from instead of the model's own. `medusa_tree`: the guesses to try,
as paths of ranks, such as [(0,), (1,), (0, 0)]; `[]` guesses nothing. Paper: Medusa, arXiv 2401.10774.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
CACHES = ("cache", "past_key_values")  # the names of transformers 5.24 and of those before it
UNDERSTOOD = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHES}


def generate(inputs: Tensor | None = None, *, model: Any, medusa_heads: Any = None, medusa_tree: Any = None,
             **kwargs: Any) -> Any:  # fmt: skip
    """`GenerationMixin.generate` with heads: the same arguments, the same greedy text, fewer forward passes."""
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    plain = functools.partial(type(model).generate, model, inputs)
    if kwargs.get("tokenizer") is not None:  # stop strings need it, and transformers hands it to no custom loop
        return plain(**kwargs)
    streamer = kwargs.get("streamer")
    heads = _heads_of(model, medusa_heads, hub)
    paths = heads.paths if medusa_tree is None else medusa_tree
    loop = functools.partial(_decode, heads=heads, tree=_Tree(paths, heads.count), shown=streamer)
    try:
        return plain(custom_generate=loop, **(kwargs | {"streamer": None}))
    except _NotThisWay as reason:
        logger.warning_once(f"Generating without Medusa heads: {reason}.")
        return plain(**kwargs)


class _NotThisWay(Exception):
    """Why this call is one for plain `generate`."""


# -- the heads ---------------------------------------------------------------------------------------------------


def _heads_of(model: Any, asked: Any, hub: dict[str, Any]) -> _Heads:
    """The heads, loaded once for each model and source."""
    source = str(asked or model.config._name_or_path)
    if asked is None and not Path(source).is_dir():
        hub.setdefault("revision", getattr(model.config, "_commit_hash", None))
    known = getattr(model, "_medusa_heads", None)
    if known is None or known[0] != (source, hub.get("revision")):
        known = ((source, hub.get("revision")), _Heads(model, *_files(source, hub)))
        object.__setattr__(model, "_medusa_heads", known)
    heads: _Heads = known[1]
    return heads


def _files(source: str, hub: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    quiet = {"_raise_exceptions_for_missing_entries": False}
    for folder in ("medusa/", ""):
        weights = cached_file(source, f"{folder}medusa_lm_head.safetensors", **hub, **quiet)
        if weights is not None:
            config = cached_file(source, f"{folder}config.json", **hub, **quiet)
            told = json.loads(Path(config).read_text(encoding="utf-8")) if config else {}
            return load_file(weights), told
    raise ValueError(f"{source} carries no Medusa heads (medusa/medusa_lm_head.safetensors); give medusa_heads=REPO.")


class _Heads:
    """K heads of any kind: own or shared projection, all tokens or some, with or without the next token as input."""

    def __init__(self, model: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        output = model.get_output_embeddings()
        self.device, self.embed = output.weight.device, model.get_input_embeddings()
        move = functools.partial(torch.Tensor.to, device=self.device, dtype=output.weight.dtype)
        blocks = [name.split(".") for name in tensors if name.endswith(".linear.weight")]
        self.count = max((int(name[0]) for name in blocks), default=-1) + 1
        layers = max((int(name[1]) for name in blocks), default=-1) + 1
        hidden = output.weight.shape[1]
        if not blocks or tensors["0.0.linear.weight"].shape[0] != hidden:
            raise ValueError(f"These Medusa heads were not made for a model of hidden size {hidden}.")
        self.blocks = [
            [tuple(move(tensors[f"{head}.{index}.linear.{part}"]) for part in ("weight", "bias"))
             for index in range(layers)]
            for head in range(self.count)
        ]  # fmt: skip
        self.conditioned = tensors["0.0.linear.weight"].shape[1] == 2 * hidden
        self.keep = tensors["keep"].to(self.device) if "keep" in tensors else None
        own = [tensors.get(f"{head}.{layers}.weight") for head in range(self.count)]
        rows = output.weight if self.keep is None else output.weight[self.keep]
        bias = getattr(output, "bias", None)
        shared = (rows, bias if bias is None or self.keep is None else bias[self.keep])
        self.projections = [shared if weight is None else (move(weight), None) for weight in own]
        self.paths = [tuple(path) for path in config.get("mergebot_tree", TREE)]

    def ranks(self, h: Tensor, root: Tensor, k: int) -> Tensor:
        """State h [H] and the token after it -> the k best token ids of each head, [K, k]."""
        h = h.to(self.device)
        found = []
        for blocks, (weight, bias) in zip(self.blocks, self.projections, strict=True):
            row = h
            for index, block in enumerate(blocks):
                reads_next = self.conditioned and index == 0
                entering = torch.cat([row, self.embed(root).to(row)], dim=-1) if reads_next else row
                row = row + F.silu(F.linear(entering, *block))
            best = F.linear(row, weight, bias).topk(min(k, weight.shape[0])).indices
            found.append(best if self.keep is None else self.keep[best])
        return torch.stack(found)


class _Tree:
    """Nodes in the order (depth, path), the root first; node i is checked after its ancestors only."""

    def __init__(self, paths: Iterable[Sequence[int]], heads: int) -> None:
        ordered = sorted({tuple(path) for path in paths if 0 < len(path) <= heads}, key=lambda path: (len(path), path))
        node: dict[tuple[int, ...], int] = {(): 0}
        for path in ordered:
            if path[:-1] not in node or min(path) < 0:
                raise ValueError(f"The Medusa tree holds {path} without the path before it.")
            node[path] = len(node)
        self.topk = max((max(path) for path in ordered), default=0) + 1
        self.depth = [len(path) for path in node]
        self.pick = [self.topk * (len(path) - 1) + path[-1] for path in ordered]
        self.children: list[list[int]] = [[] for _ in node]
        self.visible = torch.eye(len(node), dtype=torch.bool)
        for path in ordered:
            self.children[node[path[:-1]]].append(node[path])
            self.visible[node[path]] |= self.visible[node[path[:-1]]]

    def nodes(self, room: int) -> int:
        """How many nodes reach no deeper than `room`; they are the first ones."""
        return sum(1 for depth in self.depth if depth <= max(room, 0))


# -- the loop ----------------------------------------------------------------------------------------------------


def _why_plain(model: Any, ids: Tensor, processors: Any, config: Any, kwargs: dict[str, Any]) -> str | None:
    text = model.config.get_text_config(decoder=True)
    rope = json.dumps(getattr(text, "rope_parameters", None) or {}, default=str)
    cache: Any = next((kwargs[name] for name in CACHES if name in kwargs), None)
    layers = getattr(cache, "layers", None) or []
    given = {name for name, value in kwargs.items() if value is not None} - UNDERSTOOD
    if config.get_generation_mode() != GenerationMode.GREEDY_SEARCH or len(processors):
        return "only plain greedy search without logits processors is done with heads"
    if ids.shape[0] != 1 or kwargs.get("attention_mask") is not None or config.return_dict_in_generate or given:
        return "only one unpadded sequence of tokens at a time is done with heads"
    if not layers or cache.get_seq_length() or any(
        type(layer) is not DynamicLayer and not isinstance(layer, DummyLayer) for layer in layers
    ):  # fmt: skip
        return "the cache is not an empty one of full attention layers, so it cannot hold a tree"
    if getattr(model.config, "_attn_implementation", "eager") not in ("sdpa", "eager"):
        return "the attention kernel takes no tree mask; load the model with attn_implementation='sdpa'"
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False) or "mrope" in rope:
        return "the positions of this model cannot be those of a tree"
    if '"longrope"' in rope or '"dynamic"' in rope:
        return "the rotary angles of this model change with the length of the text"
    return None


def _decode(model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
            generation_config: Any = None, *, heads: _Heads, tree: _Tree, shown: Any = None,
            **kwargs: Any) -> Tensor:  # fmt: skip
    reason = _why_plain(model, input_ids, logits_processor, generation_config, kwargs)
    if reason is not None:
        raise _NotThisWay(reason)
    cached = {name: kwargs[name] for name in CACHES if name in kwargs}
    seen: dict[str, Tensor] = {}
    last = {"logits_to_keep": 1} if "logits_to_keep" in kwargs else {}
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30
    text = input_ids
    if shown is not None:
        shown.put(text.cpu())
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    try:
        logits = model(input_ids=text.to(model.device), **cached, use_cache=True, **last).logits
        h, block = seen["h"][0, -1], [int(logits[0, -1].argmax())]
        while True:
            for token in block:
                text = torch.cat([text, text.new_tensor([[token]])], dim=-1)
                if shown is not None:
                    shown.put(text[0, -1:].cpu())
                if bool(stopping_criteria(text, None).all()):
                    if shown is not None:
                        shown.end()
                    return text
            length = text.shape[1] - 1
            room = min(generation_config.max_length - text.shape[1] - 1, positions - 1 - length)
            path, block = _step(model, heads, tree, tree.nodes(room), h, text[0, -1:].to(heads.device), cached, length)
            h = seen["h"][0, path[-1]]
    finally:
        hook.remove()


def _step(model: Any, heads: _Heads, tree: _Tree, nodes: int, h: Tensor, root: Tensor,
          cached: dict[str, Any], length: int) -> tuple[list[int], list[int]]:  # fmt: skip
    """One forward pass after `length` cached tokens -> the accepted nodes and the tokens they bring."""
    options: dict[str, Any] = {}
    tokens = root.to(model.device)
    if nodes > 1:
        guesses = heads.ranks(h, root[0], tree.topk)
        # A draft vocabulary smaller than the tree is wide has no such rank: its last one stands in, and is checked.
        flat = F.pad(guesses, (0, tree.topk - guesses.shape[1]), value=int(guesses[0, -1])).flatten()
        tokens = torch.cat([tokens, flat[tree.pick[: nodes - 1]].to(model.device)])
        mask = torch.zeros((nodes, length + nodes), dtype=model.dtype, device=model.device)
        hidden = ~tree.visible[:nodes, :nodes].to(model.device)
        mask[:, length:].masked_fill_(hidden, torch.finfo(model.dtype).min)
        positions = torch.tensor([tree.depth[:nodes]], device=model.device) + length
        options = {"attention_mask": mask[None, None], "position_ids": positions}
    logits = model(input_ids=tokens[None], **cached, use_cache=True, **options).logits[0]
    best, drafted = logits.argmax(dim=-1).tolist(), tokens.tolist()
    path = [0]
    while True:
        following = [node for node in tree.children[path[-1]] if node < nodes and drafted[node] == best[path[-1]]]
        if not following:
            break
        path.append(following[0])
    if nodes > 1:
        for cache in cached.values():
            _keep(cache, path, nodes, length)
    return path, [*(drafted[node] for node in path[1:]), best[path[-1]]]


def _keep(cache: Any, path: list[int], nodes: int, length: int) -> None:
    """Leave of the last `nodes` cached tokens only those of the path, in its order."""
    for layer in cache.layers:
        if isinstance(layer, DummyLayer):
            continue
        source = torch.tensor([length + node for node in path], device=layer.keys.device)
        layer.keys[:, :, length : length + len(path)] = layer.keys[:, :, source]
        layer.values[:, :, length : length + len(path)] = layer.values[:, :, source]
    if nodes > len(path):
        cache.crop(len(path) - nodes)
