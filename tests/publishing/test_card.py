"""What the bot writes: metadata the Hub reads, and text of strangers that shows itself and does nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bot.jobs.job import Evaluation, Failure, Job, Merge, Publication, PublishedFile, Source, Stage
from bot.jobs.request import EvaluateOptions, MergeRequest, Origin, from_form, front_matter
from bot.merge.recipe import reading as recipe
from bot.publishing import card, evaluation_section, leaderboard, markdown
from bot.settings import Settings
from evaluators import comparison
from evaluators.comparison.verdict import Comparison
from evaluators.harness.scores import Environment, ModelEvaluation, Score
from evaluators.sanity_check import SanityCheck
from tests.evaluators import stored

SETTINGS = Settings(home=Path("home"), hub="http://127.0.0.1:1", namespace="mergebot")
A, B = "a" * 40, "b" * 40
TEXT = f"""merge_method: linear
models:
- {{model: org/a@{A}, parameters: {{weight: 0.5}}}}
- {{model: org/b@{B}, parameters: {{weight: 0.5}}}}
dtype: bfloat16
"""
ENVIRONMENT = Environment("cpu", "bfloat16", "16", False, 0, "0.4.13", "5.23.0", "2.13.0")
INJECTIONS = (
    "<img src=x onerror=alert(1)>",
    "](javascript:alert(1))",
    "@everyone look",
    "| a | b |",
    "```\n# heading",
    "---\nlicense: mit\n---",
    "\u202egnp.exe",
    "\x1b[31mred",
    "`code` **bold** _em_",
    "<!-- hidden -->",
)


def measured(task: str, value: float, stderr: float | None) -> Score:
    return Score(task, "acc", value, stderr, 40, 0, True, "1.0")


def evaluated(*scores: Score) -> ModelEvaluation:
    return ModelEvaluation("quick", "d" * 64, scores, ENVIRONMENT, 1.0)


def job(**changes: Any) -> Job:
    made = Job(
        id="j1",
        digest="d" * 64,
        request=from_form("alice", TEXT, "both", EvaluateOptions()),
        recipe=recipe.parse(TEXT, trust="stranger").canonical(),
        sources=(Source("org/a", A, "mit", 10), Source("org/b", B, "apache-2.0", 10)),
        plan={"method": "linear"},
        submitted_at=datetime(2026, 1, 2, tzinfo=UTC),
        ended_at=datetime(2026, 1, 2, 1, tzinfo=UTC),
        merge=Merge({"model.safetensors": PublishedFile(10, "e" * 64)}, "f" * 64, 10, 1.0, 134_515_008),
        evaluation=Evaluation(
            "f" * 64,
            evaluated(measured("left", 0.8, 0.06), measured("right", 0.3, 0.07)),
            {
                f"org/a@{A}": evaluated(measured("left", 0.85, 0.05), measured("right", 0.1, 0.05)),
                f"org/b@{B}": evaluated(measured("left", 0.1, 0.05), measured("right", 0.9, 0.04)),
            },
            None,
            1.0,
        ),
        publication=Publication("mergebot/alice-both", "c" * 40, 1.0),
    )
    return replace(made, **changes)


def test_the_metadata_names_sources_relation_licence_and_scores() -> None:
    text = card.model_card(job(), "mergebot/alice-both")
    metadata = yaml.safe_load(front_matter(text) or "")
    assert metadata["base_model"] == ["org/a", "org/b"]
    assert metadata["base_model_relation"] == "merge"
    assert metadata["license"] == "apache-2.0"
    values = [result["metrics"][0]["value"] for result in metadata["model-index"][0]["results"]]
    assert values == [0.8, 0.3]
    assert "&id" not in (front_matter(text) or "")


def test_the_headline_names_tasks_kept_and_lost_against_the_best_source() -> None:
    text = card.model_card(job(), "mergebot/alice-both")
    assert "within two standard errors of its best source, or above, on `left`" in text
    assert "below its best source on `right`" in text


def test_incomparable_scores_give_no_headline() -> None:
    why = "they were measured in float32 and in bfloat16."
    text = card.model_card(job(evaluation=replace(job().evaluation, not_compared=why)), "mergebot/alice-both")
    assert why in text and "best source" not in text


def test_every_score_in_the_table_has_its_interval_without_a_verdict_too() -> None:
    text = card.model_card(job(), "mergebot/alice-both")
    assert "| model | `left` | `right` | average of 2 tasks |" in text
    assert "| **`mergebot/alice-both`** | 80.0 (68.2 to 91.8) | 30.0 (16.3 to 43.7) | 55.0 (46.0 to 64.0) |" in text
    assert "| `org/b` | 10.0 (0.2 to 19.8) | 90.0 (82.2 to 97.8) | 50.0 (" in text


def judged(cache: Path) -> Job:
    """The same job with what its evaluation finds today: every answer, the verdict and the vitals."""
    half, most, few = [1.0, 0.0] * 20, [1.0] * 38 + [0.0] * 2, [0.0] * 38 + [1.0] * 2
    merged, first, second = (
        stored.evaluation(cache, key, {"left": left, "right": right})
        for key, left, right in (("m", most, most), ("a", most, few), ("b", half, few))
    )
    parents = {f"org/a@{A}": first, f"org/b@{B}": second}
    compared = comparison.compare(merged, parents, cache=cache)
    looked = SanityCheck(True, 1.43, 31.0, 49152, 0, 4, 0.72, 0, 22, 22, 21.5, "cpu", "float32", 1)
    signs = dict.fromkeys(("", *parents), looked)
    return job(evaluation=Evaluation("f" * 64, merged, parents, None, 1.0, {}, compared, "", signs))


def test_a_card_shows_the_comparison_with_the_parents(tmp_path: Path) -> None:
    text = card.model_card(judged(tmp_path), "mergebot/alice-both")
    assert "Against its parents, on average over 2 tasks: better than both." in text
    assert "| **`mergebot/alice-both`** | 95.0 (83.5 to 98.6) | 95.0 (83.5 to 98.6) | 95.0 (" in text
    assert "| `left` | `org/a` | no difference shown | +0.0 (-6.6 to +6.6) | 1.000 | " in text
    assert "| `right` | `org/a` | better | +90.0 (" in text
    assert "- Where only `org/a` is right, the merge is right on " in text
    assert "- Same answer as `org/a`, right or wrong: 40 of 80 questions." in text
    assert "- Same answer as `org/b`, right or wrong: 20 of 80 questions." in text
    assert "| this merge | 31 (1.43) | 72% | 0 broken, 1 looping of 4 | 22 of 22 unchanged | 21.5 (" in text
    # no number in bold but names: a figure stands with its interval
    assert not re.search(r"\*\*[-+\d.]+\*\*", text)


def test_a_card_names_the_samples_of_each_task() -> None:
    scores = (
        measured("left", 0.8, 0.06),
        measured("right", 0.3, 0.07),
        replace(measured("up", 0.3, 0.04), samples=1100),
    )
    evaluation = replace(job().evaluation, merged=evaluated(*scores))  # type: ignore[type-var]
    text = card.model_card(job(evaluation=evaluation), "mergebot/alice-both")
    assert "suite `quick`, 40 samples each of `left` and `right`, 1,100 of `up`; lm-eval" in text


def test_the_picture_is_published_beside_the_card_that_shows_it(tmp_path: Path) -> None:
    texts = card.publication_content(judged(tmp_path), SETTINGS).texts
    for name, files in texts.items():
        assert f"]({evaluation_section.PICTURE})" in files["README.md"]
        assert files[evaluation_section.PICTURE].startswith("<svg ") and name in files[evaluation_section.PICTURE]
        told = Comparison.from_dict(json.loads(files["results/comparison.json"]))
        assert told.suite == "animals" and told.tasks[0].merge.model == name and name in told.keys
    before = card.publication_content(job(), SETTINGS).texts["mergebot/alice-both"]
    assert evaluation_section.PICTURE not in before and "results/comparison.json" not in before
    assert "comparison.svg" not in before["README.md"]


def test_evaluations_stored_without_a_verdict_still_open(tmp_path: Path) -> None:
    kind = TypeAdapter(Evaluation)
    new = judged(tmp_path).evaluation
    assert kind.validate_json(kind.dump_json(new)) == new  # type: ignore[arg-type]
    old = kind.dump_python(job().evaluation, mode="json")  # type: ignore[arg-type]
    for name in ("comparison", "not_compared", "vitals"):
        del old[name]
    assert kind.validate_python(old) == job().evaluation


def test_a_card_gives_the_reason_for_a_missing_comparison(tmp_path: Path) -> None:
    evaluation = job().evaluation
    assert evaluation is not None
    said = job(evaluation=replace(evaluation, not_compared="The answers to task <b> were not kept."))
    assert "The answers to task \\<b\\> were not kept." in card.model_card(said, "mergebot/alice-both")


def test_the_recipe_in_the_card_runs_again() -> None:
    text = card.model_card(job(), "mergebot/alice-both")
    [block] = re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert recipe.parse(block, trust="stranger").digest == recipe.parse(TEXT, trust="stranger").digest


def test_a_card_lists_all_heads_and_reports_a_slowdown_first() -> None:
    def row(name: str, origin: str, rate: float | None, absent: str | None = None) -> dict[str, Any]:
        made = {"id": name, "origin": origin, "absent_because": absent, "accuracy": [{"top1": 0.31}, {"top1": 0.2}]}
        steps = {"measured": rate if origin == "fresh" else None, "common_tree": rate}
        speeds = {
            "wall": 0.8,
            "wall_ci95": [0.7, 0.9],
            "cpu": 0.8,
            "cpu_ci95": None,
            "clock_used": "wall",
            "verdict": "slower",
        }
        return {**made, "tokens_per_step": steps, "speedup": speeds, "tokens_per_s": 9.5}

    speed: dict[str, Any] = {
        "sentence": "Medusa heads run at 0.80 x plain speed: slower here.",
        "transfer": "Its parents' heads bring 1.31.",
        "plain": {"tokens_per_s": 12.0},
        "model": {"dtype": "bfloat16"},
        "environment": {"device": "cpu", "threads": 2},
        "suite": {"questions": 11, "max_new_tokens": 21},
        "warnings": ["the budget of 60 s allowed <b> 11 of 12 questions"],
        "candidates": [
            row("none", "none", 1.0),
            row("parent:org/a", "parent", 1.31),
            row("parent:org/b", "parent", None, "it has 5 tokens <b> too many."),
            row("fresh", "fresh", 1.4),
        ],
    }
    evaluation = job().evaluation
    assert evaluation is not None
    text = card.model_card(job(evaluation=replace(evaluation, decode_speed=speed)), "mergebot/alice-both")
    assert _speedups(text) == [(0.8, "tokens per second, Medusa / plain greedy, 95 % interval 0.70 to 0.90")]
    speed["candidates"][-1]["speedup"]["verdict"] = "inconclusive"
    unsure = card.model_card(job(evaluation=replace(evaluation, decode_speed=speed)), "mergebot/alice-both")
    assert _speedups(unsure) == []
    section = text[text.index("## Decode speed") : text.index("## Use")]
    assert section.splitlines()[2].startswith("Medusa heads run at 0.80 x plain speed: slower here")
    assert f"({card.SPEED_PICTURE})" in section
    assert "| bfloat16 on cpu, 2 threads | tokens/s | tokens per step |" in section
    assert "Questions: 11, each answer at most 21 tokens." in section
    assert "- the budget of 60 s allowed \\<b\\> 11 of 12 questions." in section
    assert "| heads of org/a | 0.31 0.20 | 1.31 |" in section
    assert "| heads trained for it | 0.31 0.20 | 1.40 |" in section
    assert "| heads of org/b | it has 5 tokens \\<b\\> too many. | – |" in section and "repeated" not in section


def _speedups(text: str) -> list[tuple[float, str]]:
    results = yaml.safe_load(front_matter(text) or "")["model-index"][0]["results"]
    metrics = [metric for result in results for metric in result["metrics"]]
    return [(metric["value"], metric["name"]) for metric in metrics if metric["type"] == "medusa_speedup"]


@pytest.mark.parametrize("hostile", INJECTIONS)
def test_untrusted_text_is_inert_in_a_card(hostile: str) -> None:
    notice = {"code": "X", "text": hostile, "count": 1}
    merge = replace(job().merge, notices=(notice,))  # type: ignore[type-var]
    text = card.model_card(job(merge=merge), "mergebot/alice-both")
    assert yaml.safe_load(front_matter(text) or "")["license"] == "apache-2.0"
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("- ")
    assert not re.search(r"(?<!\\)[<>\[\]`|*_#]", last[2:])
    assert not re.search(r"@\w|[\x1b\u202e]", last)


@given(st.text(max_size=200))
def test_untrusted_text_cannot_leave_its_fence_or_line(text: str) -> None:
    block = markdown.fenced(text, "yaml").splitlines()
    fence = block[0].removesuffix("yaml")
    assert block[-1] == fence
    assert not any(line.strip().startswith(fence) for line in block[1:-1])
    assert "\n" not in markdown.plain(text)
    assert markdown.code(text).count("`") == 2


def test_a_taken_name_gets_the_digest() -> None:
    assert card.output_names(job(), "mergebot") == ["mergebot/alice-both", "mergebot/alice-both-dddddddd"]
    long = job(request=from_form("a" * 60, TEXT, "n" * 90, EvaluateOptions()))
    assert all(len(name.partition("/")[2]) <= 96 for name in card.output_names(long, "mergebot"))


def test_each_candidate_name_has_its_own_card() -> None:
    texts = card.publication_content(job(publication=None), SETTINGS).texts
    assert list(texts) == ["mergebot/alice-both", "mergebot/alice-both-dddddddd"]
    for name, files in texts.items():
        assert f'from_pretrained("{name}")' in files["README.md"]
        assert f"# {name.partition('/')[2]}\n" in files["README.md"]


def test_a_card_shows_how_to_generate_with_the_heads_that_the_repo_carries() -> None:
    bare = job()
    assert bare.evaluation is not None and "custom_generate" not in card.model_card(bare, "mergebot/alice-both")
    files = {"medusa/medusa_lm_head.safetensors": PublishedFile(10, "e" * 64)}
    carrying = job(evaluation=replace(bare.evaluation, heads=files))
    text = card.model_card(carrying, "mergebot/alice-both")
    assert 'custom_generate="mergebot/alice-both", trust_remote_code=True' in text
    [promised] = [sentence for sentence in text.split(". ") if "text equals that of baseline generation" in sentence]
    assert "in float32" in promised and "in 16 bit, rounding can decide otherwise" in promised
    assert card.publication_content(carrying, SETTINGS).heads == files


def test_every_outcome_has_a_reply_with_its_reference() -> None:
    request = MergeRequest("alice", Origin.CARD, TEXT, "both", repo="alice/asks", revision=A, reply="discussion")
    failed = job(publication=None, failures=(Failure(Stage.MERGING, "DISK_FULL", "The <b>disk</b> is full.", "Wait."),))
    cancelled = job(publication=None, cancelled_at=datetime(2026, 1, 2, tzinfo=UTC))
    refusal = {"code": "CARD_INVALID", "message": "No.", "next": "Correct it and try again."}
    for found, refused, event in (
        (job(), None, "published"),
        (failed, None, "failed"),
        (cancelled, None, "cancelled"),
        (None, refusal, "refused"),
    ):
        spec = card.reply_spec(request, found, refused, SETTINGS)
        assert spec.event == event
        assert spec.ref == f"ref: mergebot/{request.key[:12]}/{event}"
        assert "<b>" not in spec.text


def test_equal_facts_give_an_equal_board() -> None:
    first, second = leaderboard.board_spec([job()], SETTINGS), leaderboard.board_spec([job()], SETTINGS)
    assert first == second
    row = leaderboard.row(job(), SETTINGS)
    assert row.average == pytest.approx(0.55)
    half = 1.959964 * (0.06**2 + 0.07**2) ** 0.5 / 2
    assert row.average_interval == pytest.approx((0.55 - half, 0.55 + half))
    assert row.intervals["org/b", "right"] == pytest.approx((0.8216, 0.9784), abs=1e-4)
    assert row.average_stderr == pytest.approx((0.06**2 + 0.07**2) ** 0.5 / 2)
    assert row.scores == {"left": (0.8, 0.06), "right": (0.3, 0.07)}
    assert row.source_scores["org/b"]["right"] == (0.9, 0.04)
