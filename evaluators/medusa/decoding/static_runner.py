"""Decoding with static shapes: fixed buffers, one CUDA graph per tree, one synchronization per step.

The state of a step stays on the device: the hidden state and the root from the last step, the length and the cache. A
greedy step drafts, verifies, accepts and reduces the cache in one graph, and the host reads back one small tensor.
Baseline decoding is the same step with the root alone. Without CUDA the same code runs without capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from evaluators.medusa.decoding.acceptance import GREEDY, Greedy, Rule
from evaluators.medusa.decoding.capability import PROBE, disagreement, narrow_window
from evaluators.medusa.decoding.runners import EagerRunner, Runner, Step
from evaluators.medusa.drafting.drafters import Drafter, TensorDrafter
from evaluators.medusa.model.attention import tiles_of
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.device_tree import DeviceTree
from evaluators.medusa.trees.tree import ROOT_ONLY, Path, Tree

SPAN = 256  # attention reads a multiple of this many rows of the cache, and each multiple has a graph
PROBE_LENGTHS = (4, 7)  # a graph that captured the length as a constant is right for one of them only
TREE_ROOM = 64  # rows reserved for any tree, so that baseline and Medusa decoding get caches of one size
WARM_UP_CALLS = 2  # libraries choose kernels and reserve memory in their first calls, which a graph must not capture

EVERY = "every layer"
Paths = tuple[Path, ...]
Strips = dict[str, Tensor]  # results of DeviceTree.mask_strip by the kind of layer
T = TypeVar("T")


class Capture(Protocol):
    """Capture of the operations of a function on fixed tensors."""

    def __call__(self, body: Callable[[], T], state: Sequence[Tensor]) -> Callable[[], T]:
        """Return a function that replays `body` and returns the same tensors each time, valid until the next replay.

        `body` reads and writes fixed tensors only and never waits for the device. The tensors in `state`, which it
        changes, have their old values after the capture.
        """
        ...


class CudaGraphs:
    """Capture into CUDA graphs that share memory: the result of one is valid until any of them is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], T], state: Sequence[Tensor]) -> Callable[[], T]:
        """Raises RuntimeError where `body` cannot be captured."""
        before = [tensor.clone() for tensor in state]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                body()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = body()

        def replay() -> T:
            graph.replay()
            return out

        return replay


@dataclass(slots=True)
class CacheRows:
    """Cache rows of the next pass, after `length` tokens: it writes `slots` [n] and reads the first `span` rows."""

    slots: Tensor
    span: int
    length: int


class StaticTreeLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: views [1, kv_heads, capacity, head_dim] of the cache tensor."""

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, place: CacheRows) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place.slots, key_states)
        self.values.index_copy_(2, self.place.slots, value_states)
        return self.keys[:, :, : self.place.span], self.values[:, :, : self.place.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.span, 0

    def get_seq_length(self) -> int:
        return self.place.length

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class StaticTreeCache(Cache):  # type: ignore[misc]
    """Cache of fixed size for a batch of one, in one tensor, so that one copy reduces it to a path in all layers.

    rows [2 * layers, kv_heads, capacity, head_dim] holds keys and values of layer i at 2i and 2i + 1.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.place = CacheRows(torch.zeros(0, dtype=torch.long, device=rows.device), 0, 0)
        pairs = zip(rows[::2, None].unbind(), rows[1::2, None].unbind(), strict=True)
        super().__init__(layers=[StaticTreeLayer(keys, values, self.place) for keys, values in pairs])

    def at(self, slots: Tensor, span: int, length: int) -> StaticTreeCache:
        """Return this cache, set for a pass that writes rows `slots` and reads the first `span`."""
        self.place.slots, self.place.span, self.place.length = slots, span, length
        return self

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` [m] to rows `target` [m] in every layer; all are read before any is written."""
        self.rows.index_copy_(2, target, self.rows.index_select(2, source))


@torch.no_grad()
def row_shape(base: Base) -> tuple[int, int, int] | str:
    """(2 * layers, kv_heads, head_dim) of the cached rows of a token, or the reason why the base has no such shape."""
    name = type(base.model).__name__
    cache = base.new_cache()
    if odd := next((layer for layer in cache.layers if type(layer) is not DynamicLayer), None):
        return f"{name} uses the cache layer {type(odd).__name__}, which has no static form."
    base.run(torch.zeros((1, 1), dtype=torch.long, device=base.device), past_key_values=cache, use_cache=True)
    tensors: Sequence[Tensor] = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1:
        return f"{name} caches keys and values of several shapes, which do not fit into one tensor."
    return len(tensors), tensors[0].shape[1], tensors[0].shape[3]


class StaticRunner:
    """Runner with a preallocated cache; with `capture` each pass and step is captured once per shape.

    Raises ValueError for a base whose cache has no static shape.
    """

    @torch.inference_mode()
    def __init__(self, base: Base, capture: Capture | None = None, *, span: int = SPAN) -> None:
        shape = row_shape(base)
        if isinstance(shape, str):
            raise ValueError(shape)
        self.base = base
        self.length = 0
        self._row_shape, self._span = shape, span
        self._capture = capture
        self.execution = "static" if capture is None else "cuda_graph"
        self._position = torch.zeros(1, dtype=torch.long, device=base.device)  # `length` on the device
        self._root = torch.zeros(1, dtype=torch.long, device=base.device)
        self._hidden = torch.zeros(base.hidden, dtype=base.dtype, device=base.device)
        self._trees: dict[Paths, DeviceTree] = {}
        self._steps: dict[tuple[Drafter | None, Paths, int], Callable[[], Tensor]] = {}
        self._passes: dict[tuple[Paths, int], tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]] = {}
        self._allocate(span)

    @torch.inference_mode()
    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> Callable[[Tree], Step] | None:
        """Allocate the cache and capture a graph for each span that the text can reach. Greedy steps are fused."""
        self._make_room(lengths.stop + max(TREE_ROOM, tree.nodes))
        self._set_length(0)
        on_device = tree.nodes == 1 or isinstance(drafter, TensorDrafter)
        fused = partial(self._step, drafter) if isinstance(rule, Greedy) and on_device else None
        if self._capture is not None:
            cuts = [tree] if fused else [tree.shallow(depth) for depth in range(tree.max_depth + 1)]
            for cut in cuts:
                first, last = (self._span_of(length + cut.nodes) for length in (lengths.start, lengths.stop - 1))
                for span in range(first, last + 1, self._span):
                    if fused:
                        self._step_call(drafter, cut, span)
                    else:
                        self._pass_call(cut, span)
        return fused

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Start a new text with `ids`, without capture. Returns h [H] and logits [V] of the last token."""
        self._make_room(len(ids) + TREE_ROOM)
        row = torch.tensor([list(ids)], device=self.base.device)
        cache = self.cache.at(torch.arange(len(ids), device=self.base.device), len(ids), 0)
        hidden, logits = self.base.run(row, last_only=True, past_key_values=cache, use_cache=True)
        self._set_length(len(ids))
        self._hidden.copy_(hidden[0, -1])
        self._root.copy_(logits[0, -1:].argmax(-1))
        return hidden[0, -1], logits[0, -1]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Tokens [n] of `tree` after the cached ones -> h [n, H], logits [n, V] (valid until the next call)."""
        self._make_room(self.length + tree.nodes)
        held, call = self._pass_call(tree, self._span_of(self.length + tree.nodes))
        held.copy_(tokens)
        hidden, logits = call()
        return hidden.clone(), logits

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Keep only the nodes of `path` (root first) of the last forward pass in the cache, in that order."""
        if list(path) != list(range(len(path))):
            source = torch.tensor([self.length + node for node in path], device=self.base.device)
            self.cache.move(source, torch.arange(self.length, self.length + len(path), device=self.base.device))
        self._set_length(self.length + len(path))

    @torch.inference_mode()
    def rewind(self, tokens: int) -> None:
        """Remove the last `tokens` cached tokens."""
        self._set_length(self.length - tokens)

    # -- fused step ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self, drafter: Drafter | None, tree: Tree) -> Step:
        call = self._step_call(drafter, tree, self._span_of(self.length + tree.nodes))
        finite, accepted, *rest = call().tolist()  # the only synchronization
        path, block = rest[: accepted + 1], rest[tree.max_depth + 1 :][: accepted + 1]
        self.length += accepted + 1
        return Step(tuple(path), block, self._hidden, bool(finite))

    def _fused_step(self, drafter: Drafter | None, tree: Tree, on_device: DeviceTree, strips: Strips) -> Tensor:
        """Run a step on the device. Returns [finite, accepted, path (d + 1), emitted tokens (d + 1)]."""
        tokens = self._root
        if isinstance(drafter, TensorDrafter) and tree.nodes > 1:
            tokens = torch.cat([tokens, drafter.draft(self._hidden, self._root, self._position, tree)])
        hidden, logits = self._pass(tokens, on_device, strips)
        best = logits.argmax(-1)
        finite = torch.isfinite(logits.gather(1, best[:, None])).all().long()  # argmax stops at a NaN
        path, accepted = on_device.greedy_path(tokens, best)
        if tree.nodes > 1:
            self.cache.move(path + self._position, on_device.steps + self._position)
        # A child is accepted if it is the base's choice, so the choices along the path are the emitted tokens.
        block = best[path]
        last = path[accepted]
        self._hidden.copy_(hidden[last][0])
        self._root.copy_(best[last])
        self._position.add_(accepted + 1)
        return torch.cat([finite[None], accepted, path, block])

    def _pass(self, tokens: Tensor, on_device: DeviceTree, strips: Strips) -> tuple[Tensor, Tensor]:
        """Tokens [n] after the cached ones -> h [n, H], logits [n, V]; their rows are appended to the cache."""
        span = (next(iter(strips.values())).shape[1] - on_device.nodes) // 2
        seen = self._columns[:span] + (span - self._position)
        masks = {kind: strip.index_select(1, seen)[None, None] for kind, strip in strips.items()}
        cache = self.cache.at(on_device.index + self._position, span, self.length)
        hidden, logits = self.base.run(
            tokens[None],
            past_key_values=cache,
            use_cache=True,
            attention_mask=masks.get(EVERY, masks),
            position_ids=(on_device.depth + self._position)[None],
        )
        return hidden[0], logits[0]

    # -- buffers and graphs --------------------------------------------------------------------------------------

    def _step_call(self, drafter: Drafter | None, tree: Tree, span: int) -> Callable[[], Tensor]:
        drafter = drafter if tree.nodes > 1 else None
        key = (drafter, tree.paths, span)
        if key not in self._steps:
            on_device, strips = self._on_device(tree, span)
            self._steps[key] = self._captured(partial(self._fused_step, drafter, tree, on_device, strips))
        return self._steps[key]

    def _pass_call(self, tree: Tree, span: int) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """(buffer [n] for the tokens, forward pass)."""
        key = (tree.paths, span)
        if key not in self._passes:
            held = torch.zeros(tree.nodes, dtype=torch.long, device=self.base.device)
            self._passes[key] = held, self._captured(partial(self._pass, held, *self._on_device(tree, span)))
        return self._passes[key]

    def _captured(self, body: Callable[[], T]) -> Callable[[], T]:
        state = (self._position, self._root, self._hidden)
        return body if self._capture is None else self._capture(body, state)

    def _on_device(self, tree: Tree, span: int) -> tuple[DeviceTree, Strips]:
        """(tree, strips from which its masks for `span` rows of the cache are cut)."""
        if tree.paths not in self._trees:
            self._trees[tree.paths] = DeviceTree(tree, self.base.device)
        on_device, window = self._trees[tree.paths], self.base.window
        strip = partial(on_device.mask_strip, span, self.base.dtype, tiles_of(self.base) if tree.nodes > 1 else 1)
        if window is None:
            return on_device, {EVERY: strip()}
        if not window.hybrid:
            return on_device, {EVERY: strip(window.size)}
        return on_device, {"full_attention": strip(), "sliding_attention": strip(window.size)}

    def _span_of(self, rows: int) -> int:
        return -(-rows // self._span) * self._span

    def _set_length(self, length: int) -> None:
        self.length = length
        self._position.fill_(length)

    def _make_room(self, rows: int) -> None:
        if rows > self.cache.rows.shape[2]:
            held = self.cache.rows
            self._allocate(self._span_of(rows))
            self.cache.rows[:, :, : held.shape[2]] = held

    def _allocate(self, capacity: int) -> None:
        """Allocate a cache of `capacity` rows. Graphs hold addresses, so those of the old cache are dropped."""
        tensors, heads, width = self._row_shape
        # Zeros: masked rows enter sums with weight 0, and 0 * NaN would be NaN.
        rows = torch.zeros((tensors, heads, capacity, width), dtype=self.base.dtype, device=self.base.device)
        self.cache = StaticTreeCache(rows)
        self._columns = torch.arange(capacity, device=self.base.device)
        self._steps.clear()
        self._passes.clear()


def fastest(base: Base) -> Runner:
    """Runner with static shapes and CUDA graphs on a GPU if the model supports them, else the eager runner."""
    if base.device.type != "cuda":
        return EagerRunner(base)
    capture = CudaGraphs()
    reason = reason_against_static(base, capture)
    return StaticRunner(base, capture) if reason is None else EagerRunner(base, reason)


@torch.inference_mode()
def reason_against_static(base: Base, capture: Capture | None = None) -> str | None:
    """A sentence on why this base cannot run with static shapes, by its config or by a trial. None if it can."""
    name = type(base.model).__name__
    if base.rope[0] == "dynamic" or base.recompute_length is not None:
        return f"{name} changes its rotary angles with the length of the text, which captured kernels do not support."
    if isinstance(shape := row_shape(base), str):
        return shape
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, base.vocab, (PROBE.nodes,), generator=generator).to(base.device)
    try:
        with narrow_window(base):
            runner = StaticRunner(base, capture)
            for length in PROBE_LENGTHS:
                ids = torch.randint(0, base.vocab, (length,), generator=generator).tolist()
                if reason := disagreement(runner, ids, tokens):
                    return f"With static shapes {reason}"
            runner.prepare(None, ROOT_ONLY, GREEDY, range(1, 2))
    except Exception as error:  # any failure means that the model is not supported
        return f"{name} does not run with static shapes ({type(error).__name__})."
    return None
