"""Models that Medusa cannot serve are refused by their config.json: the folders here hold nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BartConfig, T5Config

from bot.cli import medusa_output
from bot.errors import EvaluationError
from evaluators import medusa
from evaluators.medusa import generation
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.model import support
from evaluators.medusa.training.head_training import HeadTrainingConfig, train_heads
from tests.evaluators.medusa import tiny_causal_lms as tiny

T5 = T5Config(architectures=["T5ForConditionalGeneration"])
BART = BartConfig(architectures=["BartForConditionalGeneration"])


def written(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "qwen3-next", "bloom", "mrope", "chunked"])
def test_training_names_the_limit_of_decoding_before_weights_are_read(tmp_path: Path, kind: str) -> None:
    base = tiny.base(kind)
    with pytest.raises(EvaluationError) as refused:
        train_heads(
            written(tmp_path / "model", base.model.config), tmp_path / "out", tmp_path / "cache", HeadTrainingConfig()
        )
    assert refused.value.code == "SPEED_UNSUPPORTED" and refused.value.message == reason_against_trees(base)


@pytest.mark.parametrize(
    "kind", ["mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "jamba", "bamba", "minimax"]
)  # fmt: skip
def test_a_recurrent_state_is_found_in_the_config(kind: str) -> None:
    assert "keeps a recurrent state" in (support.reason_against_trees(AutoConfig.for_model(kind)) or "")


@pytest.mark.parametrize(
    ("kind", "wanted", "says"),
    [
        ("gpt2", HeadTrainingConfig(joint=True), "GPT2LMHeadModel has no plain linear layer"),
        ("gptj", HeadTrainingConfig(kind="own"), "cannot copy an output embedding that has a bias"),
    ],
)
def test_heads_that_a_model_cannot_have_are_refused_before_it_answers(
    tmp_path: Path, kind: str, wanted: HeadTrainingConfig, says: str
) -> None:
    folder, stages = tiny.write(tmp_path / "model", tiny.model(kind)), []
    with pytest.raises(EvaluationError, match=says) as refused:
        train_heads(
            folder, tmp_path / "out", tmp_path / "cache", wanted, progress=lambda stage, *_: stages.append(stage)
        )
    assert refused.value.code == "SPEED_UNSUPPORTED" and stages == ["load"]


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_an_encoder_decoder_is_named_as_one_before_weights_are_read(tmp_path: Path, config: Any) -> None:
    folder, out = written(tmp_path / "model", config), tmp_path / "out"
    attempts = [
        lambda: generation.load(folder, None),
        lambda: train_heads(folder, out, tmp_path / "cache", HeadTrainingConfig()),
    ]
    for attempt in attempts:
        with pytest.raises(EvaluationError, match=f"{config.architectures[0]} is an encoder-decoder") as refused:
            attempt()
        assert refused.value.code == "SPEED_UNSUPPORTED"


def test_the_speed_test_of_an_encoder_decoder_is_a_refused_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = medusa.measure(written(tmp_path / "model", T5), tmp_path / "out")
    told = report["sentence"]
    assert report["candidates"] == [] and "T5ForConditionalGeneration is an encoder-decoder" in told
    medusa_output.speed(report, tmp_path / "out" / "decode_speed.json")
    assert "is an encoder-decoder" in capsys.readouterr().out
