"""Static shapes in CUDA graphs. Not run where there is no GPU; test_medusa_static.py shows the rest on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_causal_lms as tiny
import torch

from benchmarks import decoding
from evaluators import medusa as evaluator
from evaluators.medusa.decoding.acceptance import GREEDY
from evaluators.medusa.decoding.decode import Limits, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.decoding.static_runner import CudaGraphs, StaticRunner, fastest
from evaluators.medusa.drafting.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.model.attention import GROUPED
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.calibrate import cost_curve
from evaluators.medusa.trees.tree import ROOT_ONLY, chain, full, greedy_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is to be seen here"),
]
PROMPT = [7, 42, 99, 3, 250, 7, 42]
SPARSE = greedy_tree([[0.5, 0.2, 0.1, 0.05], [0.4, 0.2, 0.1], [0.3, 0.1], [0.2, 0.1]], 24)
TREES = {"n=1": ROOT_ONLY, "chain-4": chain(4), "full": full((2, 2, 2)), "sparse": SPARSE}


def on_gpu(kind: str) -> Base:
    return Base(tiny.model(kind).to("cuda"), tiny.tokenizer())


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("kind", ["llama", "gqa", "gpt2", "opt", "window", "gemma3", "longrope"])
def test_graphs_give_the_text_of_the_growing_cache(kind: str, shape: str) -> None:
    base, tree, limits = on_gpu(kind), TREES[shape], Limits(40)
    want = baseline(EagerRunner(base), PROMPT, limits)
    runner = StaticRunner(base, CudaGraphs(), span=16)
    assert baseline(runner, PROMPT, limits).tokens == want.tokens
    text = [*PROMPT, *want.tokens]
    spec = HeadSpec("shared", 4, 1, conditioned=True, keep=tuple(range(0, tiny.VOCAB, 2)))
    for drafter in (
        HeadDrafter(tiny.random_heads(base, spec)),
        tiny.TensorOracle(text, "cuda"),
        tiny.Oracle(text),
        PromptLookup("cuda") if shape in ("n=1", "chain-4") else tiny.Always(1),
    ):
        got = medusa(runner, drafter, tree, PROMPT, limits)
        assert got.tokens == want.tokens
        if isinstance(drafter, tiny.TensorOracle) and tree.nodes > 1:
            assert got.steps < 0.7 * want.steps


def test_one_runner_serves_prompts_of_any_length_and_grows() -> None:
    base = on_gpu("gqa")
    runner = StaticRunner(base, CudaGraphs(), span=16)
    for length in (3, 70, 1, 100, 5):
        prompt = [(index * 37 + length) % 290 for index in range(length)]
        want = baseline(EagerRunner(base), prompt, Limits(25))
        assert baseline(runner, prompt, Limits(25)).tokens == want.tokens
        drafter = tiny.TensorOracle([*prompt, *want.tokens], "cuda")
        assert medusa(runner, drafter, SPARSE, prompt, Limits(25)).tokens == want.tokens


@torch.inference_mode()
def test_nothing_waits_for_the_device_inside_a_step() -> None:
    base = on_gpu("gqa")
    runner = StaticRunner(base, CudaGraphs())
    drafter = HeadDrafter(tiny.random_heads(base, HeadSpec("shared", 4, 1, conditioned=True)))
    runner.prepare(drafter, SPARSE, GREEDY, range(len(PROMPT), len(PROMPT) + 40))
    runner.prefill(PROMPT)
    replay = runner._step_call(drafter, SPARSE, 256)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            said = replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert said.tolist()[0] == 1


def test_the_fastest_way_on_a_gpu_is_graphs_and_what_cannot_take_them_says_why() -> None:
    base = on_gpu("gqa")
    assert fastest(base).execution == "cuda_graph"
    assert base.model.config._attn_implementation == GROUPED
    assert fastest(on_gpu("dynamic")).execution.startswith("eager: LlamaForCausalLM changes its rotary angles")


def test_the_cost_of_passes_is_measured_on_graphs() -> None:
    base = on_gpu("llama")
    heads = tiny.random_heads(base, HeadSpec(heads=3))
    curve = cost_curve(StaticRunner(base, CudaGraphs()), heads, 40, widths=(1, 4, 8), repeats=3)
    assert [width for width, _ in curve.points] == [1, 4, 8] and min(ms for _, ms in curve.points) > 0


@pytest.mark.slow
def test_a_report_and_the_benchmark_run_on_graphs(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("gqa"))
    measured = evaluator.measure(
        folder, tmp_path / "out", evaluator.SpeedOptions(budget_s=20, questions=2, device="cuda")
    )
    assert measured["environment"]["execution"] == "cuda_graph"
    out = tmp_path / "figures.md"
    assert decoding.main(["--shape", "tiny", "--device", "cuda", "--out", str(out)]) == 0
    assert "cuda_graph" in out.read_text()
