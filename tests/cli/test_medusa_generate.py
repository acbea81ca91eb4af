"""`mergebot medusa generate` as it is typed: the model's own text, and what it took."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import EvaluationError
from bot.stages import head_training
from evaluators.medusa import formats, generation
from evaluators.medusa.decoding.acceptance import Exact, Typical
from evaluators.medusa.decoding.decode import Limits, baseline
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads
from evaluators.medusa.model import causal_lm
from evaluators.medusa.training import prompt_sets
from tests import family


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    family.make(tmp_path)
    base = causal_lm.load(tmp_path / "base")
    formats.save(identity_heads(HeadSpec("shared", 3), base), tmp_path / "heads")
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def _printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() and letter != " ")


def _shown(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def generate(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["medusa", "generate", *arguments, "--device", "cpu"], catch_exceptions=False)


def test_the_answer_is_the_models_own_and_what_it_took_is_said(place: Path) -> None:
    base = causal_lm.load(place / "base")
    ids = prompt_sets.encode(base, "one two")
    answer = baseline(EagerRunner(base), ids, Limits(20, base.stop_ids)).tokens
    want = base.tokenizer.decode(answer, skip_special_tokens=True)
    done = generate("base", "one two", "--heads", "heads", "--new-tokens", "20", "--dtype", "float32")
    assert done.exit_code == 0
    said, _, told = done.stdout.rpartition("\n20 tokens in ")
    assert _printable(said) == _printable(want) and told and said == _shown(said), "no letter steers the terminal"
    assert " tokens in " in done.output and "the accuracy of the heads is unknown" in done.output


def test_a_model_without_heads_speaks_one_token_at_a_time(place: Path) -> None:
    done = generate("base", "one", "--new-tokens", "5")
    assert "there are no heads, so one token is decoded per step" in done.output and "medusa train" in done.output


@pytest.mark.parametrize("rule", [Exact(3, 0.9), Typical(0.7)], ids=["exact", "typical"])
def test_pieces_are_the_text_of_the_tokens_whatever_the_rule(place: Path, rule: Any) -> None:
    generator = generation.load(place / "base", place / "heads", dtype="float32")
    chunks = list(generator.generate("one two", 25, rule))
    assert len(generator.trace.tokens) <= len(chunks) <= 26
    assert "".join(chunk.text for chunk in chunks) == generator.base.tokenizer.decode(
        generator.trace.tokens, skip_special_tokens=True
    )
    assert sum(not chunk.guessed for chunk in chunks) >= generator.trace.steps


def test_a_long_prompt_is_read_whole(place: Path) -> None:
    generator = generation.load(place / "base", place / "heads", dtype="float32")
    model, tokenizer = generator.base.model, generator.base.tokenizer
    prompt = "The first word decides what comes after all the others. " * 4  # 224 of 256 positions
    ids = torch.tensor([tokenizer(prompt).input_ids])
    with torch.no_grad():
        want = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
    assert ids.shape[1] > 200 and list(generator.generate(prompt, 20)) and generator.trace.tokens == want.tolist()


def test_a_prompt_that_the_context_cannot_hold_is_refused_and_a_full_context_is_named(place: Path) -> None:
    with pytest.raises(EvaluationError, match="The prompt has 300 tokens, and the model's context holds 256") as told:
        generate("base", "x" * 300)
    assert told.value.code == "PROMPT_TOO_LONG"
    done = generate("base", "x" * 250, "--new-tokens", "50")
    assert "7 tokens in " in done.output and "ends here because the model's context is full" in done.output


def test_an_answer_that_ends_inside_a_character_shows_it_as_decoding_does(place: Path) -> None:
    generator = generation.load(place / "base", place / "heads", dtype="float32")
    said = [
        ("".join(chunk.text for chunk in generator.generate("one two", count)), generator.trace)
        for count in range(1, 26)
    ]
    assert any(text.endswith(generation.UNKNOWN) for text, _ in said)
    for text, trace in said:
        assert text == generator.base.tokenizer.decode(trace.tokens, skip_special_tokens=True)


def test_settings_of_the_model_that_are_not_applied_are_named(place: Path) -> None:
    (place / "base" / "generation_config.json").write_text('{"repetition_penalty": 1.3, "suppress_tokens": [5]}')
    done = generate("base", "one", "--heads", "heads", "--new-tokens", "3")
    told = " ".join(done.output.split())
    assert "ask for repetition_penalty 1.3 and suppress_tokens, which the decoding here does not apply" in told


def test_heads_that_carry_their_accuracy_get_their_own_tree(place: Path) -> None:
    hopeless = [[0.0] * 10] * 3
    formats.write_json(place / "heads" / "training.json", {"accuracy": hopeless})
    generator = generation.load(place / "base", place / "heads")
    assert (
        generator.tree.nodes == 1
        and "no tree is faster on this machine, so one token is decoded per step" in generator.notes
    )
    perfect = [[1.0] + [0.0] * 9] * 3
    formats.write_json(place / "heads" / "training.json", {"accuracy": perfect})
    assert generation.load(place / "base", place / "heads").tree.paths[:2] == ((0,), (0, 0))


def test_a_stop_string_ends_the_answer(place: Path) -> None:
    generator = generation.load(place / "base", place / "heads", dtype="float32")
    whole = "".join(chunk.text for chunk in generator.generate("one two", 25))
    wanted = whole[3:5]
    cut = "".join(chunk.text for chunk in generator.generate("one two", 25, stop=[wanted]))
    assert whole.startswith(cut) and wanted in cut and len(cut) < len(whole) and generator.trace.finish == "stop"


def test_several_answers_together_are_those_that_each_prompt_gets_alone(place: Path) -> None:
    generator = generation.load(place / "base", place / "heads", dtype="float32")
    prompts = ["one two", "a much longer beginning than that", "three"]
    alone = ["".join(chunk.text for chunk in generator.generate(each, 12)) for each in prompts]
    assert generator.generate_batch(prompts, 12) == alone and len(set(alone)) == 3


def test_of_the_likeliest_token_alone_every_draw_is_the_greedy_one(place: Path) -> None:
    generator = generation.load(place / "base", place / "heads", dtype="float32")
    greedy = list(generator.generate("one two", 12))
    for cut in (head_training.rule("exact", 2.0, 3, top_k=1), head_training.rule("exact", 2.0, 3, top_p=1e-6)):
        assert list(generator.generate("one two", 12, cut)) == greedy
    done = generate("base", "one", "--sample", "exact", "--top-k", "5", "--top-p", "0.9", "--new-tokens", "4")
    assert done.exit_code == 0 and "4 tokens in" in done.output


def test_a_model_in_the_place_of_heads_is_said_to_be_one(place: Path) -> None:
    with pytest.raises(EvaluationError, match=r"left is a model without heads: none of its \d+ tensors"):
        generate("base", "one", "--heads", "left")


def test_a_model_without_a_tokenizer_is_refused_for_that(place: Path) -> None:
    for file in (place / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EvaluationError, match=r"its folder holds no tokenizer, such as a tokenizer\.json"):
        generate("base", "one")
