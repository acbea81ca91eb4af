"""Model cards and replies: typed facts in, finished text out. No I/O.

Untrusted text never reaches metadata (dumped from typed values) or Markdown unescaped: a recipe is fenced by more
backticks than it contains, names are set in code style.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from bot.jobs import policy
from bot.jobs.job import Job
from bot.jobs.request import MergeRequest
from bot.jobs.specs import PublicationContent, ReplySpec
from bot.merge.recipe import reading as recipe
from bot.publishing import evaluation_section, messages
from bot.publishing.markdown import code, fenced, listed, plain, table
from bot.settings import Settings
from evaluators.harness.scores import Score
from evaluators.medusa.speed.report import CONCLUSIVE, Report
from evaluators.pictures.score_figure import score_figure
from evaluators.pictures.speed_figure import speed_figure

OUTPUT_TAG = "made-with-mergebot"
NAME_LIMIT = 96
SPEED_PICTURE = "results/decode_speed.svg"


def publication_content(job: Job, settings: Settings) -> PublicationContent:
    """Files and finished texts of a publication."""
    assert job.merge is not None and job.evaluation is not None
    names = output_names(job, settings.namespace)
    results: dict[str, str] = {}
    if job.evaluation.merged is not None:
        results["results/lm_eval.json"] = _json(_lm_eval(job))
    if job.evaluation.decode_speed is not None:
        results["results/decode_speed.json"] = _json(job.evaluation.decode_speed)
        if drawn := speed_figure(Report.from_dict(job.evaluation.decode_speed)):
            results[SPEED_PICTURE] = drawn
    return PublicationContent(
        digest=job.digest,
        manifest=job.merge.manifest,
        key12=job.request.key[:12],
        files=job.merge.files,
        heads=job.evaluation.heads,
        # A card names its own repo, so each name to try has a card.
        texts={name: {"README.md": model_card(job, name), **_comparison(job, name), **results} for name in names},
        sources=job.sources,
    )


def _comparison(job: Job, repo: str) -> dict[str, str]:
    """The comparison as data, and as a picture if it has one; both name the merge `repo`."""
    assert job.evaluation is not None
    comparison = job.evaluation.comparison
    if comparison is None:
        return {}
    drawn = score_figure(comparison, repo)
    data = {"results/comparison.json": _json(comparison.named(repo).as_dict())}
    return {**data, evaluation_section.PICTURE: drawn} if drawn else data


def output_names(job: Job, namespace: str) -> list[str]:
    """`{namespace}/{requester}-{name}`, then the same with the digest in case the first name is taken."""
    plain = f"{job.request.requester}-{job.request.name}"[:NAME_LIMIT].rstrip(".-")
    return [f"{namespace}/{plain}", f"{namespace}/{plain[: NAME_LIMIT - 9].rstrip('.-')}-{job.digest[:8]}"]


def model_card(job: Job, repo: str) -> str:
    """README.md of the published repo: metadata for the Hub, then text for people."""
    assert job.evaluation is not None
    evaluation = job.evaluation
    pictured = evaluation_section.PICTURE in _comparison(job, repo)
    metadata = yaml.dump(_metadata(job, repo), Dumper=_NoAliases, sort_keys=False, allow_unicode=True)
    method = str(job.plan["method"])
    sections = [
        f"# {repo.partition('/')[2]}",
        f"A **{method}** merge of {listed([source.repo for source in job.sources])}, merged, evaluated and published "
        f"by mergebot for {code(job.request.requester)}.",
        evaluation_section.headline(evaluation),
        "## Scores",
        evaluation_section.scores(evaluation, repo),
        *evaluation_section.against_parents(evaluation, repo, pictured=pictured),
        *evaluation_section.sanity_checks(evaluation.vitals),
        "## Decode speed",
        _speed(job),
        "## Use",
        fenced(messages.USE.format(repo=repo), "python"),
        *(
            [messages.HEADS, fenced(messages.USE_HEADS.format(repo=repo), "python"), messages.HEADS_CAUTION]
            if evaluation.heads
            else ()
        ),
        "## Sources",
        table(
            ("source", "commit", "license"),
            [(code(each.repo), f"`{each.revision}`", code(str(each.licence))) for each in job.sources],
            words=3,
        ),
        "## Recipe",
        fenced(recipe.write_yaml(recipe.from_canonical(job.recipe).document()), "yaml"),
        messages.REPRODUCE,
        "## Limitations",
        messages.CAUTION,
        *(f"- {plain(notice['text'])}" for notice in (job.merge.notices if job.merge else ())),
    ]
    return f"---\n{metadata}---\n" + "\n\n".join(section for section in sections if section) + "\n"


class _NoAliases(yaml.SafeDumper):
    """Writes a value that occurs twice twice: the Hub's metadata has no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _metadata(job: Job, repo: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "base_model": list(dict.fromkeys(source.repo for source in job.sources)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": policy.result_licence(job.sources),
        "tags": ["merge", "mergekit", OUTPUT_TAG],
    }
    results = _model_index(job)
    if results:
        metadata["model-index"] = [{"name": repo.partition("/")[2], "results": results}]
    return metadata


def _model_index(job: Job) -> list[dict[str, Any]]:
    assert job.evaluation is not None
    task = {"type": "text-generation", "name": "Text Generation"}
    results = []
    for score in job.evaluation.merged.scores if job.evaluation.merged else ():
        metric = {
            "type": score.metric,
            "value": round(score.value, 6),
            "name": f"{score.metric}, {score.few_shot}-shot",
        }
        results.append({"task": task, "dataset": _dataset(score), "metrics": [metric]})
    heads = Report.from_dict(job.evaluation.decode_speed or {}).heads
    # Metadata is shown without the text of the card, so an inconclusive speedup is left out.
    if heads and heads.speedup.ratio is not None and heads.speedup.interval and heads.speedup.verdict in CONCLUSIVE:
        low, high = heads.speedup.interval
        metric = {
            "type": "medusa_speedup",
            "value": round(heads.speedup.ratio, 4),
            "name": f"tokens per second, Medusa / plain greedy, 95 % interval {low:.2f} to {high:.2f}",
        }
        results.append(
            {"task": task, "dataset": {"type": "prompts", "name": "Speed test prompts"}, "metrics": [metric]}
        )
    return results


def _dataset(score: Score) -> dict[str, str]:
    """Dataset of a score for `model-index`: the repo of its questions, if any."""
    data = score.data
    if data is None or data.repo is None:
        return {"type": score.task, "name": score.task}
    optional = {"config": data.config, "split": data.split, "revision": data.revision}
    return {"type": data.repo, "name": score.task, **{key: value for key, value in optional.items() if value}}


def _speed(job: Job) -> str:
    assert job.evaluation is not None
    if job.evaluation.decode_speed is None:
        return messages.NO_SPEED
    speed = Report.from_dict(job.evaluation.decode_speed)
    heads, sentence = speed.heads, plain(speed.sentence or "")
    if heads is None or heads.tokens_per_s is None:
        return sentence
    lines = [
        f"| {plain(_conditions(speed))} | tokens/s | tokens per step |",
        "|---|---:|---:|",
        f"| baseline greedy | {speed.plain.tokens_per_s or 0:.1f} | 1.00 |",
        f"| Medusa heads | {heads.tokens_per_s:.1f} | {heads.tokens_per_step.measured:.2f} |",
    ]
    drawn = f"![Decoding speed relative to baseline decoding]({SPEED_PICTURE})" if speed_figure(speed) else ""
    notes = "\n".join(f"- {plain(warning)}." for warning in speed.warnings)
    tables = [sentence, drawn, "\n".join(lines), _questions(speed), notes, _transfer_table(speed)]
    return "\n\n".join(table for table in tables if table)


def _conditions(speed: Report) -> str:
    """Dtype and device of the decoding times, if the report has them."""
    machine = speed.environment
    parts = [str(speed.model.dtype)] if speed.model.dtype else []
    if machine.device:
        threads = machine.threads if machine.device == "cpu" else None
        counted = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
        parts.append(f"on {machine.device}{counted}")
    return " ".join(parts)


def _questions(speed: Report) -> str:
    """Number of timed questions and the length of the answers, as far as the report has them."""
    questions, tokens = speed.suite.questions, speed.suite.max_new_tokens
    return f"Questions: {questions}, each answer at most {tokens} tokens." if questions and tokens else ""


def _transfer_table(speed: Report) -> str:
    """All sets of heads on the merged model with the same tree; empty without heads of the parents."""
    if not speed.transfer:
        return ""
    lines = ["| heads | top-1 accuracy per head | tokens per step, same tree |", "|---|---|---:|"]
    for row in speed.candidates:
        if row.origin not in ("identity", "parent", "merged", "fresh"):
            continue
        if row.absent_because is not None:
            lines.append(f"| {plain(row.label)} | {plain(row.absent_because)} | – |")
            continue
        shares, rate = " ".join(f"{head.top1:.2f}" for head in row.accuracy), row.tokens_per_step.common_tree
        lines.append(f"| {plain(row.label)} | {shares} | {'–' if rate is None else format(rate, '.2f')} |")
    return "\n".join(lines)


def _lm_eval(job: Job) -> dict[str, Any]:
    assert job.evaluation is not None and job.evaluation.merged is not None
    return {
        "merged": asdict(job.evaluation.merged),
        "sources": {name: asdict(evaluation) for name, evaluation in job.evaluation.sources.items()},
    }


# -- answers -----------------------------------------------------------------------------------------------------


def reply_spec(
    request: MergeRequest, job: Job | None, refusal: Mapping[str, Any] | None, settings: Settings
) -> ReplySpec:
    """The reply on the requesting repo after its request has ended."""
    assert request.repo is not None  # only requests by card are replied to
    key = request.key[:12]
    event, text = _ending(job, refusal, settings)
    return ReplySpec(
        repo=request.repo,
        title=messages.TITLE.format(key=key),
        opening=messages.OPENING,
        event=event,
        text=text,
        ref=messages.REFERENCE.format(key=key, event=event),
    )


def _ending(job: Job | None, refusal: Mapping[str, Any] | None, settings: Settings) -> tuple[str, str]:
    if job is None:
        assert refusal is not None
        return "refused", messages.REFUSED.format(
            code=refusal["code"], sentence=plain(refusal["message"]), next_step=plain(refusal["next"])
        )
    if job.publication is not None and job.evaluation is not None:
        repo = job.publication.repo
        scores = evaluation_section.scores(job.evaluation, repo)
        url = f"{settings.hub}/{repo}"
        return "published", messages.PUBLISHED.format(repo=repo, url=url, commit=job.publication.commit, scores=scores)
    if job.cancelled_at is not None:
        return "cancelled", messages.CANCELLED
    last = job.failures[-1]
    return "failed", messages.FAILED.format(
        code=last.code, sentence=plain(last.sentence), next_step=plain(last.next_step)
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
