"""Tied tensors as transformers 5 loads them: the stored tensors decide, the config only names the pairs to compare.

    one of a pair stored      the other is the same tensor, whichever of the two it is
    both stored and equal     tied; the second copy takes no part
    both stored and unequal   not tied, whatever the config says

`as_loaded` turns the stored tensors into those of the loaded model under the names that transformers saves. Source:
`PreTrainedModel.tie_weights` and the `_tied_weights_keys` of its classes, transformers 5.23.
docs/design/merging.md 1.5.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.tensor_names import AUDIO, VISION, words

Read = Callable[[str, int, int], bytes]  # file, first byte, count -> bytes

_HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder|\.out_proj)?|embed_out|predictions\.decoder|mlm_score\.decoder|vocab_projector|generator_lm_head|lm_loss"
    r"|proj_out|output_projection|pred_layer\.proj)\.weight$|^(output|decoder|head|head\.decoder)\.weight$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings?|shared|tok_embeddings|embeddings|tokens_embed|transformer\.w)"
    r"\.weight$"
)
_COPY = re.compile(r"(.*\.|)(text_)?(en|de)coder\.embed_tokens\.weight")  # of `shared.weight` beside it
_BIAS = re.compile(r"(?P<parent>(?:.*\.)?(?:predictions|lm_head)\.)(?:decoder\.)?bias")  # stored in one of two places
# what stands beside the embedding of an encoder, which is `word_embeddings` there
_BESIDE_WORDS = re.compile(r"(?P<parent>(?:.*\.|)embeddings\.)(?!word_embeddings|tok_embeddings)\w+(?:\.weight)?")
_NUMBERED = re.compile(r"(^|\.)(\d+|mtp)\.")
_POSITION = re.compile(r"wpe|position")
_ENCODER = re.compile(r"(?P<parent>.*?)encoder\.")
_LAYER_LIST = re.compile(r"(?P<parent>.*?)(?P<list>layers|h|blocks|block)\.\d+\.")
# families whose encoder and decoder share one embedding, `shared.weight`
_SHARED = words(
    "bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus "
    "pegasus_x plbart pop2piano switch_transformers t5 udop umt5"
)
# families whose config class ties always, whatever config.json says
_ALWAYS = frozenset({"longt5", "mt5", "pop2piano", "t5", "udop", "umt5"})
# families that never tie, whatever config.json says
_NEVER = words(
    "bailing_hybrid cpmant evolla inkling2_text inkling_mm_model inkling_text kimi_linear mllama "
    "mllama_text_model nemotron_h rembert xlstm"
)
# families whose flag also scales the decoder's outputs or ties what `_pairs` does not know: it stays as it is
_FLAG_STAYS = frozenset({"fsmt", "prophetnet", "seamless_m4t", "seamless_m4t_v2", "switch_transformers"})
# families whose head has its bias in one place only
_OWN_BIAS = frozenset({"gte", "rembert"})
# of those that always tie: those whose flag, if False, also turns off the scaling of the decoder's outputs
_SCALED = frozenset({"longt5", "pop2piano", "t5"})
# the embedding's name beside the list of layers, and by family where another one is usual
_BESIDE_LAYER_LISTS = {"layers": "embed_tokens", "h": "wte", "blocks": "wte"}
_EMBEDDING_NAMES = {
    **dict.fromkeys(("bloom", "falcon"), "word_embeddings"),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv"), "embeddings"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), "embed_in"),
    "openai-gpt": "tokens_embed",
}
_FLAGS = ("tie_word_embeddings", "tie_embedding")  # the second: LFM2 before transformers 5
_SAMPLES, _SAMPLE_BYTES, _BLOCK_BYTES = 8, 16 * 2**10, 4 * 2**20


@dataclass(frozen=True, slots=True)
class Loaded:
    """Config and tensors of the loaded model. `presumed` are pairs (kept, left out) of which only samples were read."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    presumed: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    notices: tuple[str, ...] = ()


def is_head(name: str) -> bool:
    """True for an output projection onto the vocabulary."""
    return bool(_HEAD.search(name))


def is_embedding(name: str) -> bool:
    """True for an input embedding of tokens."""
    return bool(_EMBEDDING.search(name)) and not is_head(name)


def is_copy(name: str) -> bool:
    """True for a possible copy of an embedding that encoder and decoder share."""
    return bool(_COPY.fullmatch(name))


def main_embedding(names: Collection[str]) -> str | None:
    """The input embedding among tensors outside the layers: one shared by encoder and decoder, else the first."""
    embeddings = [name for name in names if is_embedding(name)]
    return next((name for name in embeddings if name.endswith("shared.weight")), embeddings[0] if embeddings else None)


def main_head(names: Collection[str]) -> str | None:
    """The stored output projection among tensors outside the layers, if there is one."""
    return next((name for name in names if is_head(name)), None)


def config_ties(config: Mapping[str, Any]) -> bool | None:
    """True if a config asks for ties; None where it has no flag and the class decides."""
    if config.get("model_type") in _ALWAYS:
        return True
    if config.get("model_type") in _NEVER:
        return False
    flags = [part[key] for part in language_configs(config) for key in _FLAGS if isinstance(part.get(key), bool)]
    return any(flags) if flags else None


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The model classes that a config names; empty where `architectures` is absent or no list."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def with_flag(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config with the flag set wherever transformers 4 and 5 look for it, and with nothing else changed by that."""
    out = dict(config)
    if out.get("model_type") in _FLAG_STAYS:
        return out
    if out.get("model_type") in _SCALED:
        out.setdefault("scale_decoder_outputs", out.get("tie_word_embeddings") is not False)
    out["tie_word_embeddings"] = tied
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = {**out["text_config"], "tie_word_embeddings": tied}
    for part in language_configs(out):
        if "tie_embedding" in part:
            part["tie_embedding"] = tied
    return out


def replacement(name: str, stored: Collection[str], embedding: str | None) -> str | None:
    """The stored tensor that a tied model uses for `name`, which is not stored; None if `name` is none of a pair."""
    bias = _BIAS.fullmatch(name)
    if bias is not None and name.endswith("decoder.bias"):
        return f"{bias['parent']}bias" if f"{bias['parent']}bias" in stored else None
    return embedding if is_head(name) or is_copy(name) else None


def second_bias(name: str, config: Mapping[str, Any], stored: Collection[str]) -> tuple[str, str] | None:
    """(target, source) of the tie between the two places of a head's bias, of which `name` is one."""
    match = _BIAS.fullmatch(name)
    if match is None or config.get("model_type") in _OWN_BIAS or f"{match['parent']}weight" in stored:
        return None
    return f"{match['parent']}decoder.bias", f"{match['parent']}bias"


def as_loaded(
    read: Read, label: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, thorough: bool
) -> Loaded:
    """The model that transformers loads from `tensors`.

    Samples of a pair are compared; with `thorough` all of it.
    Raises Refused TENSOR_MISSING where only the head of a tied pair is stored and its embedding has no known name.
    """
    ties = config_ties(config)
    if ties is False:
        return Loaded(config, tensors, (), tuple(_headless(label, config, tensors)))
    out, notices, presumed = dict(tensors), list[str](), list[tuple[TensorInfo, TensorInfo]]()
    pairs, apart, changed = list(_pairs(label, config, tensors)), False, False
    for target, source in pairs:
        if target not in out:
            continue
        changed = True
        if source not in out:
            out = {source if name == target else name: tensor for name, tensor in out.items()}
            out[source] = replace(out[source], name=source)
            notices.append(f"{label} stores {target} alone, which is tied to {source}; it is taken as {source}")
            continue
        equal = _equal(read, out[source], out[target], thorough)
        if equal is False:
            notices.append(f"{label}: {target} and {source} are stored and differ, so they are not tied")
            apart = True
        else:
            presumed += [] if equal else [(out[source], out[target])]
            del out[target]
    if not changed:
        return Loaded(config, tensors)
    if apart and config.get("model_type") not in _ALWAYS | _FLAG_STAYS:  # an untied model needs every tensor of its own
        out |= {target: replace(out[source], name=target) for target, source in pairs if target not in out}
    flagged = config if ties and not apart else with_flag(config, not apart)
    return Loaded(flagged, out, tuple(presumed), tuple(notices))


def require_equal(read: Read, label: str, kept: TensorInfo, left_out: TensorInfo) -> None:
    """Read two tensors whole that a plan presumed to be equal. Raises Refused NOT_SUPPORTED if they are not."""
    if not _equal(read, kept, left_out, thorough=True):
        message = f"{label} stores {left_out.name} and {kept.name}, which it ties, and some of their rows differ."
        next_step = "Download it, set tie_word_embeddings to false in its config.json, and name that folder."
        raise Refused("NOT_SUPPORTED", message, next_step, value=label)


def _headless(label: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in class_names(config))
    if generates and main_head(list(tensors)) is None:
        yield f"{label} stores no head and its config ties none; transformers fills the head with random numbers"


def language_configs(config: Mapping[str, Any]) -> list[Any]:
    """The config of a model, and that of its language model where the two are separate."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _pairs(label: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """(target, source) of every tie the model may have; the source is the name that transformers saves."""
    loose = [name for name in tensors if not _NUMBERED.search(name)]
    side = next((match for name in tensors if (match := _ENCODER.match(name))), None)
    if config.get("model_type") in _SHARED and side is not None:
        parent = next((name.removesuffix("shared.weight") for name in loose if name.endswith("shared.weight")), None)
        parent = side["parent"] if parent is None else parent
        for target in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            yield f"{parent}{target}", f"{parent}shared.weight"
        yield "lm_head.weight", f"{parent}shared.weight"
    elif (head := main_head(loose)) is not None:
        source = main_embedding(loose) or _embedding_name(label, config, tensors, head)
        if source is not None:
            yield head, source
    yield from dict.fromkeys(pair for name in loose if (pair := second_bias(name, config, tensors)))


def _embedding_name(label: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], head: str) -> str | None:
    """The name of the embedding that is not stored; None if a tensor of the head's shape may be it."""
    shape = tensors[head].shape
    loose = [name for name in tensors if name != head and not _NUMBERED.search(name)]
    if any(tensors[name].shape == shape for name in loose if not _POSITION.search(name)):
        return None
    family = str(config.get("model_type"))
    text = [name for name in loose if not any(tower.search(name) for tower in (VISION, AUDIO))]
    beside = next((match for name in text if (match := _BESIDE_WORDS.fullmatch(name))), None)
    if beside is not None:
        return f"{beside['parent']}{'tok' if family == 'modernbert' else 'word'}_embeddings.weight"
    for name in tensors:
        match = _LAYER_LIST.match(name)
        if match is None or any(tower.search(match["parent"]) for tower in (VISION, AUDIO)):
            continue
        word = _EMBEDDING_NAMES.get(family) or _BESIDE_LAYER_LISTS.get(match["list"])
        if word is not None and family not in _FLAG_STAYS:
            return f"{match['parent']}{word}.weight"
    if not (config_ties(config) and head.endswith(("lm_head.weight", "embed_out.weight"))):
        return None
    next_step = "Load it with transformers, save it again, and name that folder."
    raise Refused("TENSOR_MISSING", f"{label} stores {head} and no embedding that we know.", next_step, value=head)


def _equal(read: Read, a: TensorInfo, b: TensorInfo, thorough: bool) -> bool | None:
    """True if two tensors hold the same bytes; None if only samples were read and they are equal."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    last = max(0, a.nbytes - _SAMPLE_BYTES)
    starts = dict.fromkeys(last * i // (_SAMPLES - 1) for i in range(_SAMPLES))
    spans = itertools.chain(
        ((start, _SAMPLE_BYTES) for start in starts),
        ((start, _BLOCK_BYTES) for start in range(0, a.nbytes if thorough else 0, _BLOCK_BYTES)),
    )
    for start, count in spans:
        count = min(count, a.nbytes - start)
        if read(a.file, a.start + start, count) != read(b.file, b.start + start, count):
            return False
    return True if thorough or a.nbytes <= _SAMPLE_BYTES else None
