"""An encoder-decoder is looked at and evaluated with lm-eval's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BartConfig, T5Config
from transformers.models.auto import AutoModelForSeq2SeqLM

from evaluators import loading, sanity_check
from evaluators.sanity_check import require_sound
from tests.evaluators import tiny_harness

CONFIGS = {
    "t5": T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "bart": BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        max_position_embeddings=512,
        decoder_start_token_id=1,
    ),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random one, with the tokenizer of the tiny Llama."""
    made = tiny_harness.model(tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(CONFIGS[request.param]).save_pretrained(made)
    return made


def test_the_first_look_reads_half_a_text_and_predicts_the_other(folder: Path) -> None:
    model, tokenizer = loading.load(folder, dtype=torch.float32)
    text = "the cat sits in the house a dog runs on the water " * 4
    found = sanity_check.examine(model.eval(), tokenizer, text=text)
    assert found.encoder_decoder and found.finite and found.perplexity is None and found.continuations == 4
    ids = tokenizer(text)["input_ids"]
    half = (len(ids) + 1) // 2
    with torch.no_grad():
        loss = float(model(input_ids=torch.tensor([ids[:half]]), labels=torch.tensor([ids[half:]])).loss)
    bits = loss * (len(ids) - half) / torch.tensor(2.0).log().item()
    assert found.bits_per_byte == pytest.approx(bits / (len(text) * (len(ids) - half) / (len(ids) - 1)), rel=1e-4)
    require_sound(found)
    require_sound(found, [found])


def test_the_continuation_is_that_of_greedy_generation(folder: Path) -> None:
    model, tokenizer = loading.load(folder, dtype=torch.float32)
    prompt = tokenizer("the cat sits in the house")["input_ids"]
    made = model.eval().generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=sanity_check.NEW_TOKENS,
        num_beams=1,
        forced_eos_token_id=None,
        forced_bos_token_id=None,
        no_repeat_ngram_size=0,
    )
    ends = model.config.eos_token_id
    assert sanity_check._continued(model, prompt) == [each for each in made[0, 1:].tolist() if each != ends]


@pytest.mark.slow
def test_the_scores_of_a_t5_are_those_of_lm_eval(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = tiny_harness.model(tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(CONFIGS["t5"]).save_pretrained(model)
    suite = tiny_harness.suite(tmp_path / "task", rows=10)
    found = tiny_harness.evaluate(
        model,
        suite,
        cache=tmp_path / "cache",
        scratch=tmp_path / "scratch",
        timeout_s=240,
        batch_size="4",
        environment={"OMP_NUM_THREADS": "1"},
    )
    direct = simple_evaluate(
        HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4),
        tasks=["which_animal"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
    )
    assert direct is not None
    theirs = [sample["resps"] for sample in direct["samples"]["which_animal"]]
    assert [sample["resps"] for sample in tiny_harness.logged(found, tmp_path / "cache")] == [
        [[list(each) for each in answers] for answers in sample] for sample in theirs
    ]
    assert found.scores[0].value == direct["results"]["which_animal"]["acc,none"]
    assert found.loaded is not None and found.loaded.ends == (1,)
