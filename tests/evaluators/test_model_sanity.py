"""A look at a checkpoint before hours of tasks: what lives passes, what talks nonsense is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bot.errors import EvaluationError
from evaluators import sanity_check
from evaluators.repetition import ends_in_a_loop
from evaluators.sanity_check import HELD_TEXT, SanityCheck, examine, is_broken, require_sound
from tests import family

Spoil = Callable[[LlamaForCausalLM], None]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return family.byte_tokenizer()


@pytest.fixture(scope="module")
def text() -> str:
    """What the small model of these tests has learned."""
    return HELD_TEXT.read_text(encoding="utf-8")[:600]


def trained(tokenizer: PreTrainedTokenizerFast, text: str, steps: int) -> LlamaForCausalLM:
    """Two layers that learn one text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=256,
        eos_token_id=257,
    )
    made = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (8,))
        rows = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        made(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, text: str) -> LlamaForCausalLM:
    return trained(tokenizer, text, 160)


@pytest.fixture(scope="module")
def healthy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> SanityCheck:
    return examine(model, tokenizer, text=text)


def spoiled(model: LlamaForCausalLM, spoil: Spoil) -> LlamaForCausalLM:
    made = deepcopy(model)
    with torch.no_grad():
        spoil(made)
    return made


def refused(found: SanityCheck, *parents: SanityCheck) -> EvaluationError:
    with pytest.raises(EvaluationError) as caught:
        require_sound(found, parents)
    return caught.value


def test_a_model_that_speaks_passes_with_and_without_parents(healthy: SanityCheck) -> None:
    require_sound(healthy)
    require_sound(healthy, [healthy])
    assert healthy.finite and healthy.missing_rows == 0 and healthy.broken == 0
    assert healthy.bits_per_byte is not None and healthy.bits_per_byte < 3
    assert healthy.survived == healthy.texts and (healthy.tokens_per_s or 0) > 0
    assert len(sanity_check.cells(healthy)) == len(sanity_check.COLUMNS) and "–" not in sanity_check.cells(healthy)


@pytest.mark.parametrize(
    ("tokens", "circles"),
    [
        ([*range(20), *[1, 2, 3, 4] * 3], True),
        ([*range(20), *[7] * 12], True),
        ([*range(2), *[*range(50, 60)] * 3], True),
        ([*range(20), *[7] * 11], False),
        ([*range(20), *[1, 2, 3, 4] * 2, 1, 2, 3], False),
        ([7] * 8, False),
        ([], False),
    ],
)
def test_a_text_that_ends_in_circles_is_seen(tokens: list[int], circles: bool) -> None:
    assert ends_in_a_loop(tokens) is circles


def test_texts_that_loop_are_counted_where_people_look(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    def deaf(made: LlamaForCausalLM) -> None:
        made.lm_head.weight.zero_()

    found = examine(spoiled(model, deaf), tokenizer, text=text)
    assert found.looping == found.continuations == 4
    assert any("4 looping of 4" in cell for cell in sanity_check.cells(found))
    assert any(cell == "4 broken of 4" for cell in sanity_check.cells(replace(found, looping=None)))  # facts of before


def test_the_loss_over_windows_is_the_sum_over_single_predictions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, healthy: SanityCheck
) -> None:
    ids = tokenizer(text)["input_ids"]
    step = model.config.max_position_embeddings - 1
    nats = 0.0
    for at in range(1, len(ids)):
        start = (at - 1) // step * step
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:at]])).logits[0, -1]
        nats -= float(logits.log_softmax(-1)[ids[at]])
    assert healthy.perplexity == pytest.approx(torch.tensor(nats / (len(ids) - 1)).exp().item(), rel=1e-4)
    assert healthy.bits_per_byte == pytest.approx(nats / torch.tensor(2.0).log().item() / len(text.encode()), rel=1e-4)


def test_the_continuation_is_what_generate_writes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer("The ferry left")["input_ids"]
    with torch.inference_mode():
        ours = sanity_check._continued(model, prompt)
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=sanity_check.NEW_TOKENS, pad_token_id=258
        )[0, len(prompt) :].tolist()
    assert ours == [token for token in theirs if token != 257] and ours


def test_a_tokenizer_that_appends_its_end_token_changes_nothing(
    model: LlamaForCausalLM, text: str, healthy: SanityCheck
) -> None:
    ending = family.byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 257)]
    )
    found = examine(model, ending, text=text)
    assert replace(found, tokens_per_s=None) == replace(healthy, tokens_per_s=None)


@pytest.mark.parametrize("positions", [24, 40])
def test_a_position_table_shorter_than_a_prompt_is_not_left(tokenizer: PreTrainedTokenizerFast, positions: int) -> None:
    config = GPT2Config(
        vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=positions, bos_token_id=256, eos_token_id=257
    )
    found = examine(GPT2LMHeadModel(config).eval(), tokenizer, text="A short text that is longer than the table.")
    assert found.finite and found.continuations == len(sanity_check.PROMPTS)


def shuffled(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight) * 30)


def zeroed(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.mul_(-8)


@pytest.mark.parametrize("spoil", [shuffled, zeroed])
def test_spoiled_layers_are_seen_in_the_bits_a_plain_text_takes(
    spoil: Spoil, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, healthy: SanityCheck
) -> None:
    found = examine(spoiled(model, spoil), tokenizer, text=text)
    error = refused(found, healthy)
    assert error.code == "MODEL_NONSENSE" and "bits per byte for a plain text, its worst parent" in error.message
    assert error.next_step


def test_a_merge_is_held_against_its_worst_parent_and_no_more(healthy: SanityCheck) -> None:
    assert healthy.bits_per_byte is not None
    worse = replace(healthy, bits_per_byte=2.5 * healthy.bits_per_byte)
    assert refused(worse, healthy).code == "MODEL_NONSENSE"
    require_sound(worse, [healthy, replace(healthy, bits_per_byte=1.5 * healthy.bits_per_byte)])


def test_alone_a_model_that_guesses_blindly_is_nonsense(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    found = examine(LlamaForCausalLM(config).eval(), tokenizer)
    assert "a blind guess has 260" in refused(found).message
    require_sound(found, [found])  # where its parents are no better, it is what they are


def test_numbers_that_are_none_are_named_and_nothing_is_generated(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, healthy: SanityCheck
) -> None:
    found = examine(spoiled(model, lambda each: each.model.norm.weight.fill_(float("nan"))), tokenizer, text=text)
    assert (found.finite, found.bits_per_byte, found.continuations) == (False, None, 0)
    assert refused(found, healthy).code == "NOT_FINITE"
    assert sanity_check.cells(found)[0] == "–" == sanity_check.cells(found)[-1]


def test_text_that_circles_is_refused_unless_its_parents_circle_too(
    tokenizer: PreTrainedTokenizerFast, text: str, healthy: SanityCheck
) -> None:
    found = examine(trained(tokenizer, "la" * 100, 30), tokenizer, text=text)
    assert found.distinct is not None and found.distinct < 0.1
    sounding = replace(found, bits_per_byte=healthy.bits_per_byte, perplexity=healthy.perplexity)
    assert (
        "repeat themselves" in refused(sounding, healthy).message and "repeat themselves" in refused(sounding).message
    )
    require_sound(sounding, [sounding])


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_found_before_anything_runs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, healthy: SanityCheck
) -> None:
    small = deepcopy(model)
    small.resize_token_embeddings(100)
    found = examine(small, tokenizer, text=text)
    assert found.missing_rows > 0 and found.continuations == 0
    assert refused(found, healthy).code == "MODEL_UNLOADABLE"


def test_a_tokenizer_that_loses_text_is_refused_where_its_parents_keep_it(
    model: LlamaForCausalLM, text: str, healthy: SanityCheck
) -> None:
    lossy = family.byte_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[a-z\s]"), "x")
    found = examine(model, lossy, text=text)
    assert found.survived < healthy.survived / 2 < found.texts
    same_text = replace(found, bits_per_byte=healthy.bits_per_byte, distinct=healthy.distinct)
    assert "tokenizer returns" in refused(same_text, healthy).message
    require_sound(same_text, [same_text])


@pytest.mark.parametrize(
    ("said", "broken"),
    [
        ("a plain sentence.", False),
        ("cut off in a character \ufffd", False),
        ("a line\n\n\tand another", False),
        ("-" * 20 + " a table of many words, which has a rule above it", False),
        ("", True),
        ("  \n ", True),
        ("!" * 40, True),
        ("wo\ufffdrd and more", True),
        ("bell \x07 rings", True),
    ],
)
def test_broken_text_is_told_from_text(said: str, broken: bool) -> None:
    assert is_broken(said) is broken


@given(st.text(alphabet=st.characters(categories=("L", "N", "P")), min_size=1), st.text(alphabet=" \n", max_size=5))
def test_spaces_around_a_text_do_not_break_it(said: str, around: str) -> None:
    assert is_broken(around + said + around) == is_broken(said)


def test_a_folder_is_examined_once_and_its_vitals_survive_their_own_json(tmp_path: Path) -> None:
    folder = family.make(tmp_path / "models")["left"]
    first = sanity_check.of_folder(folder, cache=tmp_path / "cache")
    assert SanityCheck.from_dict(json.loads(json.dumps(first.as_dict()))) == first
    (folder / "README.md").write_text("said otherwise")
    assert sanity_check.of_folder(folder, cache=tmp_path / "cache") == first  # its speed too: it is the stored one
    assert sanity_check.of_folder(folder, cache=tmp_path / "cache", dtype="bfloat16") != first
    assert len(list((tmp_path / "cache" / "vitals").iterdir())) == 2
