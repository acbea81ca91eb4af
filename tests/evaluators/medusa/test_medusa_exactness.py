"""Where speculating leaves plain text: rounding is told from a defect by a computation that shares neither."""

from __future__ import annotations

import pytest
import tiny_causal_lms as tiny
import torch

from evaluators.medusa.decoding.decode import Limits, Trace
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.model import packed
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.model.rounding import in_float32
from evaluators.medusa.speed import bench, conclusions, exactness
from evaluators.medusa.speed.report import Report, Row
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import Tree, chain

HALVES = (torch.bfloat16, torch.float16)
TWINS = 256  # token 2n + 1 is read and predicted as 2n is, but for the last bit of its output row


def twins(dtype: torch.dtype) -> Base:
    """A model for which every second token is as good as the one before it, up to rounding."""
    model = tiny.model("llama", tie_word_embeddings=False).to(dtype)
    with torch.no_grad():
        inside, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        inside[1:TWINS:2] = inside[:TWINS:2]
        out[1:TWINS:2] = out[:TWINS:2] * (1 - torch.finfo(dtype).eps / 2)
    return Base(model, tiny.tokenizer())


class Nudged(EagerRunner):
    """Tokens that are read together get other logits: every odd one is so much likelier."""

    nudge = 0.0

    def forward(self, tokens: torch.Tensor, tree: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, logits = super().forward(tokens, tree)
        odd = torch.arange(logits.shape[-1]) % 2
        return hidden, logits + (self.nudge * odd if tree.nodes > 1 else 0)


class Forgetful(EagerRunner):
    """Keeps the wrong nodes of a tree in the cache."""

    def keep(self, path: tuple[int, ...]) -> None:  # type: ignore[override]
        super().keep(path if self._width == 1 else [self._width - 1 - node for node in path])


def timed(base: Base, runner: EagerRunner) -> list[bench.Block]:
    questions = [bench.Question(Prompt(str(n), "x", ("?",)), (n, 5, 9)) for n in range(4)]
    candidates = [bench.Candidate("fresh", tiny.Always(6), chain(2))]
    return bench.run_blocks(runner, candidates, questions, Limits(24, base.stop_ids))


def forged(block: bench.Block, *answers: list[int]) -> bench.Block:
    return bench.Block(block.question, block.plain, {"fresh": tuple(Trace(tokens=answer) for answer in answers)})


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fast", [False, True])
def test_a_token_that_rounding_chose_is_a_tie_and_one_that_a_defect_chose_is_not(
    dtype: torch.dtype, fast: bool
) -> None:
    base = twins(dtype)
    if fast and packed.pack(base) is not None:
        pytest.skip("weights of this type are not packed here")
    runner = Nudged(base)
    runner.nudge = 8 * torch.finfo(dtype).eps  # two steps of the type at the logits of this model
    found = exactness.divergences(base, timed(base, runner), "fresh")
    assert len(found) >= 4 and all(each.tie for each in found)
    runner.nudge = 4.0
    found = exactness.divergences(base, timed(base, runner), "fresh")
    assert len(found) >= 4 and all(each.tie is False for each in found)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_a_cache_that_keeps_the_wrong_nodes_is_never_excused(dtype: torch.dtype) -> None:
    base = Base(tiny.model("gqa").to(dtype), tiny.tokenizer())
    found = exactness.divergences(base, timed(base, Forgetful(base)), "fresh")
    assert found and all(each.tie is False for each in found)


def test_every_run_of_a_question_is_judged_to_its_end() -> None:
    base = twins(torch.bfloat16)
    block = timed(base, EagerRunner(base))[1]
    plain = block.plain[0].tokens
    first = next(at for at, token in enumerate(plain) if token < TWINS)
    tie = [*plain[:first], plain[first] ^ 1, *plain[first + 1 :]]
    wrong = [*tie[:-1], (tie[-1] + 10) % TWINS]
    told = {
        "equal": exactness.divergences(base, [forged(block, plain, plain)], "fresh"),
        "tie": exactness.divergences(base, [forged(block, plain, tie)], "fresh"),
        "later": exactness.divergences(base, [forged(block, wrong)], "fresh"),
        "second": exactness.divergences(base, [forged(block, tie, tie, wrong)], "fresh"),
        "short": exactness.divergences(base, [forged(block, plain[:-1])], "fresh"),
    }
    assert {name: [each.tie for each in found] for name, found in told.items()} == {
        "equal": [], "tie": [True], "later": [False], "second": [True, False], "short": [False],
    }  # fmt: skip
    assert [each.index for each in told["second"]] == [first, first] and told["short"][0].index == len(plain) - 1
    late = exactness.divergences(base, [forged(block, tie, wrong)], "fresh", deadline=0.0)
    assert [each.tie for each in late] == [True, None], "the first is judged however late it is"


def test_plain_decoding_itself_is_held_against_float32() -> None:
    base = twins(torch.bfloat16)
    block = timed(base, EagerRunner(base))[1]
    good = block.plain[0].tokens
    bad = bench.Block(
        block.question, (Trace(tokens=[*good[:-1], (good[-1] + 10) % TWINS]),), {"fresh": (Trace(tokens=good),)}
    )
    assert [each.tie for each in exactness.divergences(base, [bad], "fresh")] == [False]


def test_the_judge_leaves_the_model_as_it_was_and_is_not_asked_where_it_does_not_fit() -> None:
    base = Base(tiny.model("gpt2").to(torch.bfloat16), tiny.tokenizer())
    packs = packed.pack(base) is None
    ids = torch.tensor([[5, 17, 200]])
    with torch.no_grad():
        before = base.run(ids, use_cache=False)[1]
        with in_float32(base):
            assert base.run(ids, use_cache=False)[1].dtype == torch.float32
        assert torch.equal(base.run(ids, use_cache=False)[1], before)
    assert packs == any("forward" in vars(module) for module in base.model.modules())
    with pytest.raises(MemoryError, match="MiB are free"), in_float32(base, free_bytes=1):
        raise AssertionError("it was entered")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_logits_that_overflow_judge_nothing_and_memory_that_runs_out_judges_nothing() -> None:
    """A gap that is no number would also make a report that no JSON can hold."""
    base = twins(torch.float16)
    block = timed(base, EagerRunner(base))[1]
    wrong = [*block.plain[0].tokens[:-1], (block.plain[0].tokens[-1] + 10) % TWINS]
    own = base.post
    base.post = lambda logits: own(logits) * (7e4 if logits.dtype == torch.float16 else 1.0)
    assert [(each.tie, each.gap) for each in exactness.divergences(base, [forged(block, wrong)], "fresh")] == [
        (None, None)
    ]

    def too_large(logits: torch.Tensor) -> torch.Tensor:
        return logits.new_empty(1 << 60)

    base.post = too_large
    assert [each.tie for each in exactness.divergences(base, [forged(block, wrong)], "fresh")] == [None]


def test_what_was_not_judged_is_called_so() -> None:
    row = Row("fresh", "fresh").as_dict()
    row["exact"] |= {"prompts": 5, "equal": 2, "divergences": [
        {"prompt": name, "index": 1, "gap": None, "limit": None, "tie": tie}
        for name, tie in (("a", True), ("a", True), ("b", True), ("b", None), ("c", None))
    ]}  # fmt: skip
    row["tokens_per_step"]["measured"] = 1.3
    row["speedup"] |= {"wall": 1.0, "clock_used": "wall", "verdict": "same"}
    made = Report().as_dict() | {"candidates": [row]}
    made["model"]["dtype"] = "bfloat16"
    made["suite"] |= {"questions": 3, "looping": 4}  # some of two turns, answered each
    told = conclusions.sentence(Report.from_dict(made))
    assert " 4 of 5 answers repeat themselves" in told
    assert told.endswith(
        "on 2 of 5 questions; on 1 it differs where rounding in bfloat16 decides between two tokens; on 2 it differs, "
        "and whether rounding in bfloat16 explains that was not checked."
    )
