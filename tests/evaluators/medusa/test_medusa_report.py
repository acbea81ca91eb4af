"""The speed report: whole, honest, and the same story as its figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from bot.errors import EvaluationError
from evaluators import medusa
from evaluators.medusa.speed import conclusions, transfer
from evaluators.medusa.speed.report import Divergence, Exact, Report, Row, Speedup, TimedTree
from evaluators.medusa.training import prompt_sets
from evaluators.pictures.speed_figure import speed_figure


def facts(ties: tuple[bool | None, ...] = (True, None), **changes: Any) -> conclusions.Facts:
    """Heads that promised much and were timed at 1.2 x the speed of the baseline, on text that a tie changed once."""
    divergences = tuple(Divergence(str(at), 1, 0.1, 0.2, tie) for at, tie in enumerate(ties))
    fresh = Row(
        "fresh", "fresh", tree=TimedTree(nodes=4), exact=Exact(5, 3, divergences),
        speedup=Speedup(wall=1.2, clock_used="wall", verdict="faster"),
    )  # fmt: skip
    native = Row("native", "native", speedup=Speedup(cpu=2.0, clock_used="cpu"))
    return replace(conclusions.Facts((native, fresh), "fresh", "fresh", True, False, {}, 8), **changes)


def test_a_speed_is_recommended_and_what_makes_it_doubtful_recommends_nothing() -> None:
    assert asdict(conclusions.drawn(facts())) == {
        "refusal": None, "verdict": "faster", "recommendation": "speculate with 4 nodes", "chosen": "fresh",
        "transfer": None,
    }  # fmt: skip
    hesitant = conclusions.drawn(facts(promised=False))
    assert (hesitant.verdict, hesitant.recommendation, hesitant.chosen) == ("faster", conclusions.DO_NOT, "none")
    native, fresh = facts().candidates
    silent = conclusions.drawn(facts(candidates=(native, replace(fresh, speedup=Speedup(verdict="inconclusive")))))
    assert (silent.recommendation, silent.chosen) == (conclusions.DO_NOT, "none"), "nothing was decoded"
    doubtful: dict[str, Any] = {"clock_errors": {"fresh": 0.031}, "slow_baseline": True}
    told = [conclusions.drawn(facts(clock_errors={"fresh": 0.031})), conclusions.drawn(facts(**doubtful))]
    told.append(conclusions.drawn(facts((True, False), **doubtful)))
    for found, reason in zip(
        told, ("clocks disagree by 3.1%", "ran at 0.50 x the speed", "text of 1 of 5"), strict=True
    ):
        assert reason in (found.refusal or "")
        assert (found.verdict, found.recommendation, found.chosen) == (None, None, "none")


def test_a_report_says_in_words_what_its_figures_say() -> None:
    made = Report().as_dict()
    row = Row("fresh", "fresh").as_dict()
    made["candidates"], made["recommendation"] = [row], "do not speculate"
    made["environment"] |= {"device": "cpu", "threads": 2}
    row["tokens_per_step"]["measured"] = 1.3
    row["speedup"] |= {"wall": 0.82, "wall_ci95": [0.7, 0.9], "clock_used": "wall", "verdict": "slower"}
    row["training"] |= {"steps": 57, "tokens": 2421, "generate_s": 30.0, "features_s": 1.0, "fit_s": 9.0}
    row["exact"] |= {"prompts": 5, "equal": 5}
    assert conclusions.sentence(Report.from_dict(made)) == (
        "Medusa heads trained in 40 s on 2421 tokens of the model's own text bring 1.30 tokens per step; on this CPU "
        "(2 threads) decoding with them runs at 0.82 x the speed of baseline decoding "
        "(95 % interval 0.70 to 0.90): decoding with them is "
        "slower here. Do not speculate here. Greedy text was equal to baseline decoding on 5 of 5 questions."
    )
    made["candidates"] = [{**row, "id": "heads:a"}, {**row, "id": "heads:b", "tokens_per_step": {"measured": 1.5}}]
    made["chosen"] = "heads:b"
    told = conclusions.sentence(Report.from_dict(made))
    assert "bring 1.50 tokens" in told and "These are the given heads b, of 2 sets." in told
    made["candidates"] = [row]
    row["training"]["steps"] = 9
    assert conclusions.sentence(Report.from_dict(made)).startswith(
        "Medusa heads that are hardly trained (9 steps; trained in 40 s on 2421 tokens of the model's own text; give "
        "it more time) bring 1.30 tokens per step; "
    )
    row["training"]["steps"] = 0
    assert conclusions.sentence(Report.from_dict(made)).startswith("Untrained Medusa heads")
    made["refusal"] = "it has a recurrent state."
    assert conclusions.sentence(Report.from_dict(made)).endswith("was not measured: it has a recurrent state.")


def test_a_report_of_an_earlier_build_is_read_with_all_figures_that_are_still_shown() -> None:
    stored = json.loads((Path(__file__).parent / "decode_speed_of_528d73e.json").read_text())
    read = Report.from_dict(stored)
    assert read.heads is not None and (read.heads.id, read.heads.label) == ("fresh", "heads trained for it")
    assert (read.heads.speedup.ratio, read.heads.speedup.interval) == (1.4529, (1.3289, 1.5672))
    assert "<svg" in speed_figure(read) and conclusions.carried(read, ("fresh",)) == read.heads

    def assert_kept(now: Any, before: Any) -> None:
        if isinstance(now, dict):
            for key in now.keys() - {"shortened"}:  # it came later
                assert_kept(now[key], before[key])
        elif isinstance(now, list):
            assert len(now) == len(before)
            for one, other in zip(now, before, strict=True):
                assert_kept(one, other)
        else:
            assert now == before

    assert_kept(read.as_dict(), stored)
    assert Report.from_dict(read.as_dict()) == read
    without = {key: value for key, value in stored.items() if key in ("candidates", "sentence")} | {"plain": None}
    assert Report.from_dict(without).candidates == read.candidates, "missing parts are not measured"


SHAPE = {
    "schema chosen recommendation verdict refusal transfer sentence warnings seconds model environment suite "
    "cost_curve aa plain candidates": None,
    "weights_sha256 architecture parameters layers hidden_size vocab_size dtype": "model",
    "device cores threads torch transformers attention execution load_before load_after seed": "environment",
    "name sha256 questions turns max_new_tokens chat_template mean_context_tokens repeats order looping "
    "shortened": "suite",
    "context_tokens clock points": "cost_curve",
    "ratio ci95 ok": "aa",
    "tokens steps wall_s cpu_s tokens_per_s": "plain",
}  # fmt: skip
ROW = {
    "id origin source absent_because overhead tokens_per_s heads accuracy tree tokens_per_step speedup exact "
    "categories training": None,
    "kind count layers conditioned kept_vocab": "heads",
    "nodes depth paths chosen": "tree",
    "expected simulated measured common_tree": "tokens_per_step",
    "wall wall_ci95 cpu cpu_ci95 clock_used predicted_here verdict": "speedup",
    "prompts equal divergences": "exact",
    "prompts tokens positions generate_s features_s fit_s steps seed break_even_tokens": "training",
}  # fmt: skip


def assert_whole(measured: dict[str, Any]) -> None:
    for keys, part in SHAPE.items():
        assert set(measured if part is None else measured[part]) == set(keys.split())
    for row in measured["candidates"]:
        for keys, part in ROW.items():
            assert set(row if part is None else row[part]) == set(keys.split()), row["id"]
    assert measured["schema"] == "mergebot.decode_speed/1"
    json.dumps(measured, allow_nan=False)


@pytest.mark.slow
def test_a_measurement_is_whole_exact_and_on_disk(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("gqa", initializer_range=0.15, max_position_embeddings=512))
    heard: list[tuple[str, int, int]] = []
    measured = medusa.measure(
        folder,
        tmp_path / "out",
        medusa.SpeedOptions(budget_s=9, questions=4, max_new_tokens=24),
        progress=lambda *a: heard.append(a),
    )
    assert_whole(measured)
    assert json.loads((tmp_path / "out" / "decode_speed.json").read_text()) == measured
    assert {path.name for path in (tmp_path / "out" / "heads").iterdir()} == {
        "medusa_lm_head.safetensors",
        "config.json",
        "training.json",
    }
    learnt = transfer.learnt_prompts([transfer.Given("heads", "fresh", tmp_path / "out" / "heads")])
    built_in = {prompt_sets.fingerprint(prompt.turns[0]) for prompt in prompt_sets.builtin("train")}
    assert learnt and learnt <= built_in
    rows = {row["id"]: row for row in measured["candidates"]}
    assert list(rows) == ["none", "native", "prompt_lookup", "identity", "fresh"]
    fresh = rows["fresh"]
    assert measured["refusal"] is None
    # How many questions fit into the budget depends on the machine; that all are exact does not.
    timed = measured["suite"]["questions"]
    assert fresh["exact"]["equal"] == fresh["exact"]["prompts"] == timed and 1 <= timed <= 4
    assert fresh["training"]["steps"] > 0 and fresh["tokens_per_step"]["measured"] >= 1
    # The arithmetic on the timed text says exactly what decoding did.
    assert fresh["tokens_per_step"]["simulated"] == pytest.approx(fresh["tokens_per_step"]["measured"], abs=1e-4)
    # In CPU time, since the tests run beside each other.
    assert rows["none"]["speedup"]["cpu"] == pytest.approx(1.0, abs=0.5) and rows["native"]["exact"]["equal"] >= 1
    assert measured["chosen"] == ("none" if measured["recommendation"] == "do not speculate" else "fresh")
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == [
        "load", "generate", "fit", "calibrate", "bench",
    ]  # fmt: skip
    assert measured["seconds"]["total"] < 45
    said = measured["sentence"]
    assert (
        f"{fresh['tokens_per_step']['measured']:.2f} tokens per step" in said
        and f"{timed} of {timed} questions" in said
    )


@pytest.mark.slow
def test_given_prompts_are_timed_and_none_of_them_is_trained_on(shared: Path, tmp_path: Path) -> None:
    model = tiny.model("llama", max_position_embeddings=512)
    model.generation_config.repetition_penalty = 1.3
    folder = tiny.write(tmp_path / "model", model, template=None)
    leaked = prompt_sets.builtin("train")[0]
    asked = {"category": "leaked", "turns": ["Something else.", leaked.turns[0].upper()]}
    published = (shared / "hub_seed" / "mt_bench" / "question.jsonl").read_text().splitlines()[:2]
    (tmp_path / "question.jsonl").write_text("\n".join([json.dumps(asked), *published]))
    measured = medusa.measure(
        folder,
        tmp_path / "out",
        medusa.SpeedOptions(prompts=tmp_path / "question.jsonl", budget_s=4, questions=3, max_new_tokens=16),
    )
    assert_whole(measured)
    assert measured["suite"]["name"] == "question" and measured["suite"]["chat_template"] is False
    assert 1 <= measured["suite"]["questions"] <= 3
    assert f"1 of our prompts were too close to a test prompt: {[leaked.id]}" in measured["warnings"]
    assert any("ask for repetition_penalty 1.3, which the decoding here" in warning for warning in measured["warnings"])
    native = next(row for row in measured["candidates"] if row["id"] == "native")
    assert native["absent_because"] or native["exact"]["equal"] == native["exact"]["prompts"]
    where = measured["environment"]
    assert (where["torch"], where["transformers"]) == (torch.__version__, transformers.__version__)
    assert where["threads"] >= 1 and where["cores"] >= 1 and where["load_after"] is not None and where["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("habit", ["stops at once", "repeats itself"])
def test_a_degenerate_model_still_gives_a_whole_report(habit: str, tmp_path: Path) -> None:
    model = tiny.model("gqa", tie_word_embeddings=False)
    favourite = tiny.EOS if habit == "stops at once" else 65
    with torch.no_grad():  # every hidden row becomes the same, and the output embedding prefers one token
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[favourite] = 1.0
    folder = tiny.write(tmp_path / "model", model)
    measured = medusa.measure(folder, tmp_path / "out", medusa.SpeedOptions(budget_s=4, questions=2, max_new_tokens=24))
    assert_whole(measured)
    fresh = measured["candidates"][-1]
    if habit == "stops at once":
        assert fresh["tokens_per_step"]["measured"] is None and fresh["speedup"]["verdict"] == "inconclusive"
        assert "stopped" in measured["sentence"] or "first token" in measured["sentence"]
    else:
        assert any("repeat themselves" in warning for warning in measured["warnings"])
        assert fresh["tokens_per_step"]["measured"] > 1.5


@pytest.mark.slow
def test_questions_that_exceed_the_context_are_named_and_timed_to_its_end(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("gpt2"))  # 64 positions, and every token is a byte
    measured = medusa.measure(folder, tmp_path / "out", medusa.SpeedOptions(budget_s=6, questions=2, max_new_tokens=48))
    assert measured["suite"]["shortened"] == measured["suite"]["questions"] >= 1
    assert any("only their ends were used" in warning for warning in measured["warnings"])


@pytest.mark.slow
def test_answers_and_questions_that_the_budget_takes_away_are_named(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("llama"))
    measured = medusa.measure(
        folder, tmp_path / "out", medusa.SpeedOptions(budget_s=0.1, questions=3, max_new_tokens=500)
    )
    suite = measured["suite"]
    assert suite["max_new_tokens"] == 16 and suite["questions"] < 3
    said = "the budget of 0.1 s allowed answers of at most 16 tokens instead of 500 and {questions} of 3 questions"
    assert said.format(**suite) in measured["warnings"]


@pytest.mark.slow
def test_a_model_that_cannot_take_trees_gives_a_report_with_a_refusal(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("chunked"))
    measured = medusa.measure(folder, tmp_path / "out", medusa.SpeedOptions(budget_s=4, questions=2))
    assert_whole(measured)
    assert not any("budget" in warning for warning in measured["warnings"])
    assert "attention windows or chunks" in measured["refusal"]
    assert [row["id"] for row in measured["candidates"]] == ["none", "native", "prompt_lookup"]
    assert measured["candidates"][1]["exact"]["equal"] >= 1 and measured["plain"]["tokens_per_s"] > 0
    assert measured["refusal"] in measured["sentence"]
    assert json.loads((tmp_path / "out" / "decode_speed.json").read_text()) == measured


@pytest.mark.slow
def test_a_model_with_a_window_is_measured_past_it_with_as_many_heads_as_a_given_tree_is_deep(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("window"))
    (tmp_path / "tree.json").write_text("[[0], [1], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    measured = medusa.measure(
        folder,
        tmp_path / "out",
        medusa.SpeedOptions(budget_s=6, questions=3, max_new_tokens=24, tree=tmp_path / "tree.json"),
    )
    assert_whole(measured)
    assert measured["refusal"] is None
    fresh = measured["candidates"][-1]
    assert fresh["heads"]["count"] == fresh["tree"]["depth"] == 4
    assert (fresh["tree"]["nodes"], fresh["tree"]["chosen"]) == (6, "given")
    assert [point["n"] for point in measured["cost_curve"]["points"]] == [1, 6]
    assert fresh["exact"]["equal"] == fresh["exact"]["prompts"] >= 1
    assert fresh["tokens_per_step"]["simulated"] == pytest.approx(fresh["tokens_per_step"]["measured"], abs=1e-4)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_not_filled_up(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"1 of its tensors are missing.*layers\.1\.mlp\.up_proj") as refused:
        medusa.measure(folder, tmp_path / "out", medusa.SpeedOptions(budget_s=10))
    assert refused.value.code == "MODEL_UNLOADABLE"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"holds no config\.json"):
        medusa.measure(tmp_path, tmp_path / "out", medusa.SpeedOptions(budget_s=4))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EvaluationError) as refused:
        medusa.measure(tmp_path, tmp_path / "out", medusa.SpeedOptions(budget_s=4))
    assert refused.value.code == "MODEL_UNLOADABLE"
    assert not (tmp_path / "out").exists()
