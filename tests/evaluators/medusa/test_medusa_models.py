"""Models of many families: the row that heads read is found, text is that of `generate`, and what ends it is known."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from transformers import T5Config, T5ForConditionalGeneration

from bot.errors import EvaluationError
from evaluators.medusa.decoding.acceptance import Exact
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.decode import Limits, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import Heads, HeadSpec, identity_heads, vocabulary_cut
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench
from evaluators.medusa.speed.bench import Question
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import chain, full

PROMPT = [7, 42, 99, 3, 250, 7, 42]
FAMILIES = (
    "latent",  # DeepSeek: keys and values of unlike widths
    "minicpm3",  # divides the row before the output embedding
    "hyperclovax",  # multiplies the logits
    "nanochat",  # caps them
    "mixtral",
    "gptj",  # an output embedding with a bias
    "opt-projected",  # an output embedding narrower than the layers
    "bert",  # layers between the backbone and the output embedding
)


@pytest.mark.parametrize("kind", FAMILIES)
def test_heads_and_trees_work_on_any_decoder_and_leave_its_text_as_it_is(kind: str) -> None:
    base, limits = tiny.base(kind), Limits(24)
    assert reason_against_trees(base) is None
    ids = torch.arange(9)[None]
    hidden, logits = base.run(ids, use_cache=False)
    torch.testing.assert_close(logits, base.model(input_ids=ids).logits)
    torch.testing.assert_close(base.logits(hidden), logits)
    torch.testing.assert_close(identity_heads(HeadSpec(), base)(hidden[0], ids[0])[0], logits[0])
    want = baseline(EagerRunner(base), PROMPT, limits)
    assert len(set(want.tokens)) > 2, "a model that repeats itself proves little"
    assert bench.native(base, Question(Prompt("1", "x", ("?",)), tuple(PROMPT)), limits)[0] == want.tokens
    oracle = tiny.Oracle([*PROMPT, *want.tokens], base.vocab)
    heads = tiny.random_heads(base, HeadSpec("shared", 3, conditioned=True))
    for drafter in (oracle, HeadDrafter(heads)):
        got = medusa(EagerRunner(base), drafter, full((2, 2, 2)), PROMPT, limits)
        assert got.tokens == want.tokens
        assert drafter is not oracle or got.steps < want.steps / 2
    drawn = baseline(EagerRunner(base), PROMPT, limits, Exact(seed=2)).tokens
    assert medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *drawn]), chain(3), PROMPT, limits, Exact(2)).tokens == drawn


def test_hidden_rows_are_found_where_logits_are_scaled_capped_or_hidden_behind_the_model() -> None:
    for name, change in (("granite", "divides"), ("cohere", "multiplies"), ("gemma2-like", "caps")):
        base = scaled(name)
        ids = torch.arange(10)[None]
        hidden, logits = base.run(ids, use_cache=False)
        torch.testing.assert_close(logits, base.model(input_ids=ids).logits, msg=f"{name} {change}")
        torch.testing.assert_close(base.logits(hidden), logits)


def scaled(name: str) -> Base:
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip
    configs: dict[str, Any] = {
        "granite": lambda: GraniteConfig(**sizes, logits_scaling=7.0),
        "cohere": lambda: CohereConfig(**sizes, logit_scale=0.3),
        "gemma2-like": lambda: Gemma2Config(
            **sizes, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=None
        ),
    }
    torch.manual_seed(0)
    return Base(AutoModelForCausalLM.from_config(configs[name]()), tiny.tokenizer())


def test_the_row_behind_further_layers_is_taken_where_it_enters_the_output_embedding() -> None:
    base = tiny.base("bert")
    ids = torch.arange(9)[None]
    hidden, _ = base.run(ids, use_cache=False)
    assert not torch.allclose(hidden, base.model.base_model(input_ids=ids).last_hidden_state, atol=1e-2)


def test_whatever_any_config_calls_the_end_ends_the_text() -> None:
    made, words = tiny.model("llama"), tiny.tokenizer()
    text = baseline(EagerRunner(tiny.base("llama")), PROMPT, Limits(30)).tokens
    ends = list(dict.fromkeys(text[4:]))[:4]
    made.generation_config.eos_token_id, made.config.eos_token_id = ends[:2], ends[2]
    words.eos_token = words.convert_ids_to_tokens(ends[3])
    base = Base(made, words)
    assert base.stop_ids == set(ends)
    for rest in (ends, ends[1:], ends[2:], ends[3:]):
        limits = Limits(30, base.stop_ids & set(rest))
        want = baseline(EagerRunner(base), PROMPT, limits).tokens
        assert want[-1] in rest and not set(want[:-1]) & set(rest)
        assert medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *text]), full((2, 2, 2)), PROMPT, limits).tokens == want


def test_an_end_that_the_model_cannot_say_is_no_end() -> None:
    """Some configs write -1, and a tokenizer may have more tokens than the model: a draft vocabulary has neither."""
    made, words = tiny.model("llama", vocab_size=40), tiny.tokenizer()
    made.generation_config.eos_token_id, made.config.eos_token_id = -1, 7
    words.eos_token = words.convert_ids_to_tokens(200)
    base = Base(made, words)
    assert base.stop_ids == {7}
    Heads(HeadSpec("shared", 1, keep=vocabulary_cut([5, 5], 4, base)), base)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(EvaluationError, match="T5ForConditionalGeneration is not a decoder-only"):
        Base(T5ForConditionalGeneration(config), tiny.tokenizer())


def test_an_attention_kernel_that_takes_no_mask_is_refused() -> None:
    base = Base(tiny.model("llama"), tiny.tokenizer())
    assert reason_against_trees(base) is None
    base.model.config._attn_implementation = "flash_attention_2"
    reason = reason_against_trees(base)
    assert reason is not None and "the attention kernel flash_attention_2, which takes no tree mask" in reason
