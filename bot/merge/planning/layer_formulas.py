"""Formulas of single families: computation of per-layer properties from the config, as in transformers 5.23.

Each takes the part of the config that describes the layers, and their count, and returns one entry per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bot.merge.planning.layer_rules import (
    DENSE,
    FULL,
    LINEAR,
    SLIDING,
    SPARSE,
    WHOLE,
    Formula,
    Kinds,
    Part,
    every,
    first,
    setting,
)

INDEXED, HYBRID = "indexed_attention", "hybrid"
_ZAMBA2 = "MMMMMMH" + "MMMMMH" * 6 + "MMMMHMMMHMM"


def each(kind: Callable[[int, int], Any]) -> Formula:
    """The kind as a function of the layer's number and the count of layers."""
    return lambda part, layers: [kind(i, layers) for i in range(layers)]


def where(key: str, formula: Formula, *, default: Any = None) -> Formula:
    """The formula if `key` is set; otherwise all layers are equal."""
    return lambda part, layers: formula(part, layers) if setting(part, key, default) else [None] * layers


place = each(lambda i, n: i)
place_and_count = each(lambda i, n: (i, n))
is_first = each(lambda i, n: i == 0)
is_last = each(lambda i, n: i == n - 1)


def upper_window(default: int = 28, *, switch: bool = True) -> Formula:
    """Qwen2 and relatives: a sliding window from layer `max_window_layers` on; some need `use_sliding_window`."""

    def kinds(part: Part, layers: int) -> Kinds:
        window = part.get("sliding_window", 4096 if switch else None)
        on = window is not None and (part.get("use_sliding_window") or not switch)
        top = setting(part, "max_window_layers", default)
        return [SLIDING if on and i >= top else FULL for i in range(layers)]

    return kinds


def lower_window(part: Part, layers: int) -> Kinds:
    """Qwen2-MoE: every second layer below `max_window_layers`."""
    on, top = part.get("use_sliding_window"), setting(part, "max_window_layers", 28)
    return [SLIDING if on and i % 2 == 0 and i < top else FULL for i in range(layers)]


def exaone(part: Part, layers: int) -> Kinds:
    """EXAONE 4: no pattern without a window."""
    if part.get("sliding_window", 4096) is None:
        return [FULL] * layers
    return every(("sliding_window_pattern", 4))(part, layers)


def cohere2_moe(part: Part, layers: int) -> Kinds:
    """Command with experts: one pattern for the dense layers in front, another after them."""
    head = min(setting(part, "first_k_dense_replace", 0), layers)
    before = every(("prefix_dense_sliding_window_pattern", 1))(part, head)
    return before + every(("sliding_window_pattern", 4))(part, layers - head)


def last_full(formula: Formula) -> Formula:
    """Full attention in the last layer, whatever the formula gives."""
    return lambda part, layers: [*formula(part, layers)[:-1], FULL][:layers]


def last_is_full(part: Part, layers: int) -> Kinds:
    """Gemma 4: transformers changes the last entry of the list to full attention."""
    given = part.get("layer_types")
    changed = isinstance(given, list) and len(given) == layers and given[-1] != FULL
    return [changed and i == layers - 1 for i in range(layers)]


def window_if_set(kind: str, default: int | None) -> Formula:
    """The same kind in all layers if there is a window, else full attention."""
    return lambda part, layers: [kind if part.get("sliding_window", default) is not None else FULL] * layers


def shared_kv(default: int) -> Formula:
    """Gemma 3n and 4: the last layers use keys and values of earlier ones."""

    def kinds(part: Part, layers: int) -> Kinds:
        return first(layers - setting(part, "num_kv_shared_layers", default), "own", "shared")(part, layers)

    return kinds


def no_rope(part: Part, layers: int) -> Kinds:
    """1 in the layers with rotary positions, 0 in every n-th."""
    return every(("no_rope_layer_interval", 4), 0, 1)(part, layers)


def llama4_attention(part: Part, layers: int) -> Kinds:
    """Chunked attention in the layers with rotary positions."""
    ropes = part.get("no_rope_layers") or no_rope(part, layers)
    return ["chunked_attention" if rope else FULL for rope in ropes[:layers]]


def llama4_experts(part: Part, layers: int) -> Kinds:
    """Experts in the layers of `moe_layers`, else in every n-th."""
    if part.get("moe_layers") is not None:
        return [i in part["moe_layers"] for i in range(layers)]
    return every(("interleave_moe_layer_step", 1), True, False)(part, layers)


def smollm3_attention(part: Part, layers: int) -> Kinds:
    """A window in the layers without rotary positions."""
    ropes = part.get("no_rope_layers") or no_rope(part, layers)
    on = part.get("use_sliding_window") and part.get("sliding_window") is not None
    return [SLIDING if on and not rope else FULL for rope in ropes[:layers]]


def qwen_experts(skipped: tuple[int, ...] = ()) -> Formula:
    """Experts in every n-th layer, except those listed as dense."""

    def kinds(part: Part, layers: int) -> Kinds:
        step, dense = setting(part, "decoder_sparse_step", 1), setting(part, "mlp_only_layers", skipped)
        return [(i + 1) % step == 0 and i not in dense for i in range(layers)]

    return kinds


def ernie_experts(part: Part, layers: int) -> Kinds:
    """Experts in every n-th layer between a first and a last one."""
    start, end = setting(part, "moe_layer_start_index", 1), setting(part, "moe_layer_end_index", -1)
    step, end = setting(part, "moe_layer_interval", 1), layers - 1 if end == -1 else end
    return [(i + 1) % step == 0 and start <= i <= end for i in range(layers)]


def dense_then_every(part: Part, layers: int) -> Kinds:
    """Dense layers first, then every n-th sparse; `moe_layer_freq` may also be a list."""
    head, step = setting(part, "first_k_dense_replace", 1), setting(part, "moe_layer_freq", 1)
    on = [bool(step[i]) if isinstance(step, list) else i % step == 0 for i in range(layers)]
    return [SPARSE if i >= head and on[i] else DENSE for i in range(layers)]


def minimax_m3_attention(part: Part, layers: int) -> Kinds:
    """A list of ones and zeros inside `sparse_attention_config`."""
    given = setting(part, "sparse_attention_config", {}).get("sparse_attention_freq", [0] * layers)
    return ["minimax_m3_sparse" if on else FULL for on in given[:layers]]


def minimax_m3_experts(part: Part, layers: int) -> Kinds:
    """A list of ones and zeros."""
    return [SPARSE if on else DENSE for on in setting(part, "moe_layer_freq", [1] * layers)[:layers]]


def step_experts(part: Part, layers: int) -> Kinds:
    """The numbers of the sparse layers, as a list or as text."""
    given = setting(part, "moe_layers_enum", range(3, layers))
    at = {int(item) for item in (given.split(",") if isinstance(given, str) else given) if str(item).strip()}
    return [SPARSE if i in at else DENSE for i in range(layers)]


def indexers(part: Part, layers: int) -> Kinds:
    """GLM with an indexer: a layer has its own or uses the one before."""
    pattern = part.get("index_topk_pattern")
    if pattern is not None:
        return [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern][:layers]
    step, offset = max(setting(part, "index_topk_freq", 1), 1), setting(part, "index_skip_topk_offset", 2)
    return ["full" if max(i - offset + 1, 0) % step == 0 else "shared" for i in range(layers)]


def kimi_attention(part: Part, layers: int) -> Kinds:
    """Kimi Linear: layer numbers from 1 on inside `linear_attn_config`."""
    inner = setting(part, "linear_attn_config", {})
    if "full_attn_layers" in inner and "kda_layers" in inner:
        return [FULL if i + 1 in inner["full_attn_layers"] else LINEAR for i in range(layers)]
    return [FULL if i and i % 4 == 0 else LINEAR for i in range(layers)]


def deepseek_v4_attention(part: Part, layers: int) -> Kinds:
    """Two kinds of compressed attention, by a list of ratios or alternating after the second layer."""
    high, low = "heavily_compressed_attention", "compressed_sparse_attention"
    names = {0: SLIDING, 4: low, 128: high}
    if part.get("compress_ratios") is not None:
        return [names.get(ratio) for ratio in part["compress_ratios"]][:layers]
    return [low if i > 1 and i % 2 else high for i in range(layers)]


def letters(part: Part, layers: int) -> Kinds:
    """Nemotron-H: one letter per layer."""
    names = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
    return [names.get(letter, letter) for letter in setting(part, "hybrid_override_pattern", "ME*-")][:layers]


def gpt_neo_attention(part: Part, layers: int) -> Kinds:
    """Pairs of a list of kinds and its number of repetitions."""
    pairs = setting(part, "attention_types", [[["global", "local"], 12]])
    return [kind for kinds, times in pairs for kind in list(kinds) * times][:layers]


def repeated_blocks(part: Part, layers: int) -> Kinds:
    """RecurrentGemma: a list that is repeated."""
    return (list(setting(part, "block_types", ("recurrent", "recurrent", "attention"))) * layers)[:layers]


def zamba_blocks(part: Part, layers: int) -> Kinds:
    """Zamba: three layers, then a period."""
    step, offset = setting(part, "attn_layer_period", 6), setting(part, "attn_layer_offset", 4)
    return [LINEAR, LINEAR, HYBRID, *(HYBRID if i % step == offset else LINEAR for i in range(layers - 3))][:layers]


def zamba2_blocks(part: Part, layers: int) -> Kinds:
    """Zamba 2: the order of the published model."""
    return [HYBRID if letter == "H" else LINEAR for letter in _ZAMBA2][:layers]


def shared_blocks(formula: Formula) -> Formula:
    """Zamba: hybrid layers share weights and adapters by their order among the hybrid layers."""

    def kinds(part: Part, layers: int) -> Kinds:
        given = part.get("layers_block_type") or part.get("layer_types") or formula(part, layers)
        at = [i for i, kind in enumerate(given[:layers]) if kind == HYBRID]
        return [(at.index(i), len(at)) if i in at else None for i in range(layers)]

    return kinds


def muse_thetas(default: float) -> Formula:
    """Muse: no rotary positions in every fourth layer, counted from the last."""

    def kinds(part: Part, layers: int) -> Kinds:
        theta = setting(setting(part, "rope_parameters", {}), "rope_theta", setting(part, "rope_theta", default))
        return [0 if (layers - 1 - i) % 4 == 0 else theta for i in range(layers)]

    return kinds


def depth_scale(part: Part, layers: int) -> Kinds:
    """MiniCPM: the output of a layer is scaled by `scale_depth` / sqrt(number of layers)."""
    return [round(setting(part, "scale_depth", 1.4) / math.sqrt(layers), 9)] * layers


def proposed_depth_scale(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
    """The `scale_depth` that gives the same scale with another number of layers."""
    yield {"scale_depth": wanted[0] * math.sqrt(len(wanted))}


def deepstack(part: Part, layers: int) -> Kinds:
    """Qwen3-VL: each of the first text layers adds the features of one layer of the vision tower."""
    whole = part.get(WHOLE, {})
    vision = (setting(whole, "thinker_config", whole)).get("vision_config") or {}
    fed = len(setting(vision, "deepstack_visual_indexes", (8, 16, 24)))
    return [i if i < fed else None for i in range(layers)]


def order_of(key: str, default: tuple[int, ...]) -> Formula:
    """Place of each layer in a list of layer numbers; None if it is absent."""

    def kinds(part: Part, layers: int) -> Kinds:
        at = list(setting(part, key, default))
        return [at.index(i) if i in at else None for i in range(layers)]

    return kinds


def proposed_order(key: str) -> Callable[[Kinds, Part], Iterator[Mapping[str, Any]]]:
    """List of layer numbers for the wanted places."""

    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        at = {place: i for i, place in enumerate(wanted) if place is not None}
        yield {key: [at[place] for place in sorted(at)]}

    return propose


def inkling_attention(part: Part, layers: int) -> Kinds:
    """Inkling: a window in the layers of `local_layer_ids`, else in all but every sixth."""
    local = setting(part, "local_layer_ids", [i for i in range(layers) if (i + 1) % 6])
    return ["hybrid_sliding" if i in local else HYBRID for i in range(layers)]


def minimax_decay(part: Part, layers: int) -> Kinds:
    """MiniMax: linear attention decays by the layer's number and the count of layers."""
    kinds = part.get("layer_types") or every(2, LINEAR, FULL)(part, layers)
    return [(i, layers) if kind == LINEAR else None for i, kind in enumerate(kinds[:layers])]


def olmo_hybrid(part: Part, layers: int) -> Kinds:
    """Full attention in every fourth layer, at least in the last one."""
    kinds = every(4, FULL, LINEAR)(part, layers)
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


def has_both_kinds(part: Part, layers: int) -> Kinds:
    """OLMo Hybrid: the config class refuses a list with one kind of layers only."""
    kinds = part.get("layer_types") or olmo_hybrid(part, layers)
    return [LINEAR in kinds and len(set(kinds)) > 1] * layers


def moonshine_windows(_: Part, layers: int) -> Kinds:
    """The windows of the published encoder."""
    return [[16, 4], [16, 4], [16, 0], [16, 0], [16, 4], [16, 4]][:layers]


def kv_sources(part: Part, layers: int) -> Kinds:
    """Distance, in layers, to the source of keys and values."""
    return [i - source for i, source in enumerate(setting(part, "kv_source_layers", range(layers)))][:layers]


def absolute(distances: Kinds) -> Kinds:
    """Layer numbers from distances back."""
    return [i - distance for i, distance in enumerate(distances)]


def dots3_attention(part: Part, layers: int) -> Kinds:
    """dots3: a window in three of four layers after the second."""
    full = FULL if part.get("use_dsa", None if "per_layer_config" in part else True) is False else INDEXED
    on = part.get("use_sliding_window", True)
    return [full if not on or i < 2 or i % 4 == 1 else SLIDING for i in range(layers)]


def evolla(part: Part, layers: int) -> Kinds:
    """Evolla: an adapter in every n-th layer, n from the count of layers."""
    step = max(layers // setting(part, "aligner_num_add_layers", 8), 1)
    return [(i + 1) % step == 0 for i in range(layers)]
