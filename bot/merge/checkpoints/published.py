"""Published names of tensors: one table from the names of transformers 5's modules to those of published files.

transformers 5 reads both; its save_pretrained writes the published ones unless it loaded the others. transformers 4
reads the published ones and initialises most of the others at random. `bot` knows them without importing
transformers; a test holds the tables against its `conversion_mapping`.

    layers.0.mlp.experts.gate_up_proj (E, 2I, H)  ->  layers.0.block_sparse_moe.experts.e.w1.weight (I, H), .w3
    model.language_model.layers.0...              ->  language_model.model.layers.0...

A fused tensor becomes its parts: each lies in one run of bytes, so the rest of the engine does not need to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.header import Limits, TensorInfo, refuse
from bot.merge.checkpoints.tensor_names import words
from bot.merge.checkpoints.ties import language_configs

Key = TypeVar("Key")
Renames = tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor that holds equal shares of dimension 0; `by_expert`: of dimension 0 of every expert's matrix."""

    name: str  # the end of its name
    parts: tuple[str, ...]  # the ends of the published names, in the order in which they lie
    by_expert: bool = True


@dataclass(frozen=True, slots=True)
class Naming:
    """The steps from a family's names in memory to the published names: first `fused`, then `renames`."""

    fused: tuple[Fused, ...] = ()
    renames: Renames = ()

    def __add__(self, other: Naming) -> Naming:
        return Naming(self.fused + other.fused, self.renames + other.renames)


def _renames(*pairs: tuple[str, str]) -> Naming:
    return Naming((), tuple((re.compile(pattern), published) for pattern, published in pairs))


_GATE_UP_DOWN = Naming(
    (
        Fused(".experts.gate_up_proj", ("gate_proj.weight", "up_proj.weight")),
        Fused(".experts.down_proj", ("down_proj.weight",)),
    )
)
_W1_W3_W2 = Naming(
    (Fused(".experts.gate_up_proj", ("w1.weight", "w3.weight")), Fused(".experts.down_proj", ("w2.weight",)))
)
_UP_DOWN = Naming((Fused(".experts.up_proj", ("up_proj.weight",)), Fused(".experts.down_proj", ("down_proj.weight",))))
_CONVOLUTIONS = Naming(
    (Fused(".conv1d.weight", ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"), by_expert=False),)
)
_FORGET_GATE = _renames((r"\.self_attn\.forget_gate\.", ".self_attn."))
_SPARSE = (r"\.mlp\.(?=(experts|gate|shared_experts|e_score_correction_bias)\b)", ".block_sparse_moe.")
_MIXTRAL = _W1_W3_W2 + _renames(_SPARSE)
_GRANITE = _renames(
    (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
    (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
    (r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),
)
_APART = words(
    "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 flex_olmo glm4_moe glm4_moe_lite glm4v_moe "
    "glm4v_moe_text glm_moe_dsa hunyuan_v1_moe jamba longcat_flash mellum olmoe qwen2_moe qwen3_moe qwen3_next "
    "qwen3_omni_moe_text solar_open"
)
# towers of vision-language models, in which transformers 5 leaves out one level of names
_TOWER = _renames(
    (
        r"((?:vision|image|video)_tower)\.(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)",
        r"\1.vision_model.",
    )
)
_TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "mlcd_vision_model", "mlcd")
# model_type -> naming; transformers 4 does not read these names, so they are never written
_FAMILIES: dict[str, Naming] = {
    **dict.fromkeys(_APART, _GATE_UP_DOWN),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
    "phimoe": _W1_W3_W2 + _renames((r"\.mlp\.router\.", ".mlp.gate."), _SPARSE),
    "lfm2_moe": _W1_W3_W2,
    "nemotron_h": _UP_DOWN + _renames((r"^model\.", "backbone.")),
    "kimi_linear": _MIXTRAL
    + _CONVOLUTIONS
    + _FORGET_GATE
    + _renames((r"\.block_sparse_moe\.(?=(gate|up|down)_proj\.)", ".mlp.")),  # so transformers 5.23 saves dense layers
    "gpt_neox": _renames((r"^lm_head\.", "embed_out.")),
    "aria_text": _renames(
        (r"\.experts\.gate_up_proj$", ".experts.fc1.weight"), (r"\.experts\.down_proj$", ".experts.fc2.weight")
    ),
    "axk1": _GATE_UP_DOWN + _renames((r"\.mlp\.post_mlp_layernorm\.", ".post_mlp_layernorm.")),
    "axk2": _GATE_UP_DOWN
    + _renames(
        (r"layernorm\.mlp\.fc1\.", "layernorm.W_down."),
        (r"layernorm\.mlp\.fc2\.", "layernorm.W_up."),
        (r"\.self_attn\.q_gate_proj\.", ".self_attn.q_b_proj."),
    ),
    "ernie4_5_moe": _GATE_UP_DOWN + _renames((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics.")),
    "exaone_moe": _GATE_UP_DOWN + _renames((r"\.gate\.e_score_correction_bias$", ".e_score_correction_bias")),
    "kolibri1": _GATE_UP_DOWN
    + _renames(
        (r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router.expert_bias"),
        (r"\.post_self_attn_layernorm\.", ".post_attn_norm."),
        (r"\.post_mlp_layernorm\.", ".post_ffn_norm."),
    ),
    "laguna": _GATE_UP_DOWN
    + _renames(
        (r"\.gate\.e_score_correction_bias$", ".experts.e_score_correction_bias"),
        (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
    ),
    "mimo_v2_flash": _GATE_UP_DOWN + _renames((r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias")),
    "flint": _GATE_UP_DOWN + _renames((r"\.self_attn\.sinks$", ".self_attn.softmax_offset")),
    "hy_v3": _GATE_UP_DOWN
    + _renames(
        (r"\.mlp\.gate\.weight$", ".mlp.router.gate.weight"),
        (r"\.mlp\.e_score_correction_bias$", ".mlp.expert_bias"),
        (r"\.mlp\.shared_experts\.", ".mlp.shared_mlp."),
    ),
    "bailing_hybrid": _GATE_UP_DOWN
    + _CONVOLUTIONS
    + _FORGET_GATE
    + _renames(
        (r"\.self_attn\.o_proj\.", ".self_attn.dense."),
        (r"\.self_attn\.", ".attention."),
        (r"^model\.embed_tokens\.", "model.word_embeddings."),
        (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias"),
    ),
    **dict.fromkeys(_TOWERS, _TOWER),
}
_EXPERT = re.compile(r"\.experts\.(gate_up_proj$|\d+\.)")
_UNDER_MODEL = (
    r"^model\.(?=(vision_tower|image_tower|video_tower|audio_tower|vision_model|multi_modal_projector|image_newline"
    r"|vision_embed_tokens|encoder|projector|acoustic_tokenizer_encoder|semantic_tokenizer_encoder)\b)"
)
_LLAVA = _renames(
    # `model.language_model.model.` was written by some versions of transformers 5
    (r"^model\.language_model\.(model\.)?", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (_UNDER_MODEL, ""),
)
_LIKE_LLAVA = words(
    "aria audioflamingo3 aya_vision fuyu gemma3 glmasr got_ocr2 granite_speech granite_speech_plus internvl llava "
    "llava_next llava_next_video llava_onevision mistral3 mllama musicflamingo paligemma pp_chart2table "
    "qwen2_audio vibevoice_asr video_llava vipllava voxtral voxtral_realtime"
)
_QWEN2_VL = _renames((r"^model\.(?=(visual|audio_tower)\.)", ""), (r"^model\.language_model\.", "model."))
# model_type -> naming; all versions of transformers that have the family read both, so sources that agree keep theirs
_EITHER: dict[str, Naming] = {
    **dict.fromkeys(_LIKE_LLAVA, _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _QWEN2_VL),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen4_exp_text"), _GATE_UP_DOWN),  # published fused, saved apart
    "emu3": _renames(
        (r"^model\.text_model\.", "text_model.model."),
        (r"^lm_head\.", "text_model.lm_head."),
        (r"^model\.vqmodel\.", "vqmodel."),
    ),
    "paddleocr_vl": _renames(
        (r"^model\.projector\.", "mlp_AR."), (r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")
    ),
}


def one_naming(sources: Mapping[Key, Checkpoint], limits: Limits) -> dict[Key, Checkpoint]:
    """The checkpoints of one recipe under names that agree: published names wherever two namings meet.

    Raises `Refused`: BAD_CHECKPOINT where two tensors get one name, or where parts are more than `limits` allow;
    NOT_SUPPORTED where two sources hold the same tensors in an order that cannot be read in place.
    """
    out = {key: _named(one, _FAMILIES, limits) for key, one in sources.items()}
    published = {key: _named(one, _EITHER, limits) for key, one in out.items()}
    changed = {published[key] is not one for key, one in out.items() if _namings(one.config, _EITHER)}
    agreed = published if len(changed) > 1 else out
    _refuse_layouts(agreed.values())
    return agreed


def published_name(config: Mapping[str, Any], name: str) -> str:
    """The published name of a tensor (none that is fused) or of a module of transformers 5."""
    for naming in (*_namings(config, _FAMILIES), *_namings(config, _EITHER)):
        name = _renamed(name, naming.renames)
    return name


def _namings(config: Mapping[str, Any], table: Mapping[str, Naming]) -> list[Naming]:
    """The namings of a model and of the models inside it, whose names do not start at the beginning."""
    own = config.get("model_type")
    out = [table[own]] if isinstance(own, str) and own in table else []
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, Mapping):
            for naming in _namings(part, table):
                inside = tuple(one for one in naming.renames if not one[0].pattern.startswith("^"))
                out.append(Naming(naming.fused, inside))
    return out


def _refuse_layouts(sources: Iterable[Checkpoint]) -> None:
    """Refuse sources of one family whose experts lie differently still: apart, in one tensor, or in one transposed."""
    layouts: dict[object, dict[str, tuple[Checkpoint, TensorInfo]]] = {}
    for source in sources:
        tensor = next((one for name, one in source.tensors.items() if _EXPERT.search(name)), None)
        if tensor is not None:
            seen = layouts.setdefault(source.config.get("model_type"), {})
            seen.setdefault(_layout_of_experts(source, tensor), (source, tensor))
    for seen in layouts.values():
        if len(seen) > 1:
            (source, tensor), (other, second) = (seen[layout] for layout in sorted(seen)[:2])
            message = (
                f"{source.name} holds its experts as {tensor.name} {list(tensor.shape)}, {other.name} as {second.name} "
                f"{list(second.shape)}; these two layouts cannot be read as one."
            )
            next_step = (
                "Load the one that is not as published with transformers 5, copy its state_dict into a model made by "
                "from_config, and save that one."
            )
            raise Refused("NOT_SUPPORTED", message, next_step, value=tensor.name)


def _layout_of_experts(source: Checkpoint, tensor: TensorInfo) -> str:
    if not tensor.name.endswith(".experts.gate_up_proj"):
        return "apart"
    hidden = language_configs(source.config)[-1].get("hidden_size")
    return "fused, inputs first" if hidden in tensor.shape[1:2] else "fused"


def _named(source: Checkpoint, table: Mapping[str, Naming], limits: Limits) -> Checkpoint:
    """`source` under published names; itself if it has them already."""
    namings = _namings(source.config, table)
    if not namings:
        return source
    fused = [(one, tensor) for tensor in source.tensors.values() for one in _fused(tensor, namings)]
    parts = sum(tensor.shape[0] * len(one.parts) if one.by_expert else len(one.parts) for one, tensor in fused)
    if parts + len(source.tensors) - len(fused) > limits.tensors:
        refuse(source.name, f"holds more than {limits.tensors:,} tensors, with those that are stored as one.")
    split = {tensor.name: one for one, tensor in fused}
    out: dict[str, TensorInfo] = {}
    changed: tuple[str, str] | None = None
    for tensor in source.tensors.values():
        pieces = _parts(tensor, split[tensor.name]) if tensor.name in split else [tensor]
        for piece in pieces:
            name = piece.name
            for naming in namings:
                name = _renamed(name, naming.renames)
            if name in out:
                refuse(source.name, f"holds `{name[:120]}` twice, under two namings.")
            out[name] = piece if name == piece.name else replace(piece, name=name)
            changed = changed or (None if name == tensor.name else (tensor.name, name))
    if changed is None:
        return source
    notice = f"{source.name} holds {changed[0]}, as transformers 5 names it; here it is {changed[1]}, as published"
    return replace(source, tensors=out, notices=(*source.notices, notice))


def _renamed(name: str, renames: Renames) -> str:
    for pattern, published in renames:
        name = pattern.sub(published, name, count=1)
    return name


def _fused(tensor: TensorInfo, namings: Iterable[Naming]) -> Iterator[Fused]:
    """The kind of fused tensor this is, if it is one."""
    for naming in namings:
        for one in naming.fused:
            shares = tensor.shape[1:2] if one.by_expert else tensor.shape[:1]
            if tensor.name.endswith(one.name) and len(tensor.shape) == 3 and shares[0] % len(one.parts) == 0:
                yield one
                return


def _parts(tensor: TensorInfo, fused: Fused) -> Iterator[TensorInfo]:
    """The published tensors inside a fused one, in the order of their bytes."""
    experts, rows = (tensor.shape[0], tensor.shape[1]) if fused.by_expert else (1, tensor.shape[0])
    shape = (rows // len(fused.parts), *tensor.shape[2 if fused.by_expert else 1 :])
    nbytes = tensor.nbytes // max(1, experts * len(fused.parts))
    stem = tensor.name.removesuffix(fused.name) + (".experts." if fused.by_expert else ".")
    for i in range(experts * len(fused.parts)):
        expert, part = divmod(i, len(fused.parts))
        name = f"{stem}{expert}.{fused.parts[part]}" if fused.by_expert else f"{stem}{fused.parts[part]}"
        yield TensorInfo(name, tensor.dtype, shape, tensor.file, tensor.start + i * nbytes, nbytes)
