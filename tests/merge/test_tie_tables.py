"""Our tables of tied names against the source text of transformers, which is read and not imported."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from bot.merge.checkpoints import ties
from bot.merge.checkpoints.architecture import _PREDICTION

MODELS = Path(importlib.util.find_spec("transformers").origin).parent / "models"  # type: ignore[union-attr, arg-type]
# what is tied there and is no vocabulary of a language model: detectors, codecs, prompts of images
OTHER = re.compile(
    r"bbox|class_embed|prompt_encoder|embed_patches|relative_bias|codebook|audio|video|mim_head|mmm|mlm_head|ctc_head"
    r"|eoi_embedding|entity|language_model\.layers|language_model\.norm|language_model\.embed_tokens|unembedding"
    r"|decoder\.word_embeddings|encoder\.word_embeddings|local_encoder|class_labels|mask_embed|score_head"
)
NO_HEAD_OF_THE_MODEL = {"fsmt", "t5gemma2", "flaubert", "xlm", "openai"}  # stored by no program without their source


def texts(pattern: str) -> Iterator[tuple[str, str]]:
    """(family, text) of every file of transformers that `pattern` names."""
    for path in sorted(MODELS.glob(pattern)):
        yield path.parent.name.replace("_", "-"), path.read_text()


def tied_pairs() -> Iterator[tuple[str, str, str]]:
    """(family, target, source) of every `_tied_weights_keys`."""
    for family, text in texts("*/modeling_*.py"):
        for found in re.findall(r"^    _tied_weights_keys = (\{[^}]*\})", text, re.MULTILINE):
            pairs = ast.literal_eval(found)
            yield from ((family, target, source.removesuffix("$")) for target, source in pairs.items())


def families_that(assign: str) -> set[str]:
    """The families whose config class sets an attribute whatever else it is told."""
    return {family for family, text in texts("*/configuration_*.py") if f"\n        {assign}" in text}


def known(families: frozenset[str]) -> set[str]:
    return {family.replace("_", "-") for family in families}


def test_every_tied_head_and_embedding_of_transformers_is_known_by_name() -> None:
    pairs = [pair for pair in tied_pairs() if not OTHER.search(pair[1])]
    assert len(pairs) > 250
    unknown = set()
    for family, target, source in pairs:
        if target.endswith(".weight") and ties.replacement(target, {source}, source) != source:
            unknown.add((family, target, source))
        if target.endswith("decoder.bias") and ties.replacement(target, {source}, None) != source:
            unknown.add((family, target, source))
        if target.endswith(".weight") and not ties.is_embedding(source):
            unknown.add((family, target, source))
    assert {family for family, _, _ in unknown} <= NO_HEAD_OF_THE_MODEL, unknown


def test_families_that_share_one_embedding_are_those_of_transformers() -> None:
    sharing = {
        family
        for family, target, source in tied_pairs()
        if ties.is_copy(target) and re.fullmatch(r"(\w+\.)?shared\.weight", source)
    }
    per_config = {"marian"}  # decides in its constructor
    assert sharing - {"seamless-m4t", "seamless-m4t-v2"} == known(ties._SHARED) - per_config


def test_families_that_always_tie_are_those_of_transformers() -> None:
    assert families_that("self.tie_word_embeddings = True") - {"vilt"} == known(ties._ALWAYS)
    assert families_that("self.scale_decoder_outputs = ") == known(ties._SCALED)


def test_families_without_ties_are_those_of_transformers() -> None:
    tied = {family for family, _, _ in tied_pairs()}
    own_class = re.compile(r"^class \w+ForCausalLM\(\w+", re.MULTILINE)
    found = {family for family, text in texts("*/modeling_*.py") if own_class.search(text) and family not in tied}
    other = {"auto", "clvp", "moshi", "musicgen", "musicgen-melody"}  # models of sound
    parts = {"inkling-mm-model", "inkling-text", "inkling2-text", "mllama-text-model", "evolla"}
    assert not tied & known(ties._NEVER)
    assert found - other - {"inkling", "inkling2"} == known(ties._NEVER) - parts


def test_heads_with_one_bias_are_those_of_transformers() -> None:
    tied = {family for family, target, _ in tied_pairs() if target.endswith("decoder.bias")}
    assert not tied & known(ties._OWN_BIAS)


def test_prediction_layers_that_transformers_leaves_out_by_name_are_known() -> None:
    patterns = set[str]()
    for _, text in texts("*/modeling_*.py"):
        for found in re.findall(r"_keys_to_ignore_on_load_unexpected = (\[[^\]]*\])", text):
            patterns |= set(ast.literal_eval(found))
    found = {pattern for pattern in patterns if "mtp" in pattern}
    assert len(found) > 5
    for name in (
        "mtp.fc.weight",
        "model.mtp.layers.0.q.weight",
        "model.mtp_layers.0.q.weight",
        "mtp_dspark.0.q.weight",
    ):
        assert any(re.search(pattern, name) for pattern in found)
        assert _PREDICTION.search(name)
