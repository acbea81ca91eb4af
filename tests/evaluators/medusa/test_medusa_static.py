"""Static shapes: the text of the growing cache, token for token, whether steps are recorded once or run anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import Recorded

from bot.errors import EvaluationError
from evaluators import medusa as evaluator
from evaluators.medusa.decoding.acceptance import Exact, Greedy, Typical
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.decode import Limits, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.decoding.static_runner import StaticRunner, fastest, reason_against_static
from evaluators.medusa.drafting.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.model.attention import GROUPED, grouped_attention, use_grouped
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.calibrate import cost_curve
from evaluators.medusa.trees.device_tree import DeviceTree
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree, chain, full, greedy_tree

PROMPT = [7, 42, 99, 3, 250, 7, 42]
SPARSE = greedy_tree([[0.5, 0.2, 0.1, 0.05], [0.4, 0.2, 0.1], [0.3, 0.1], [0.2, 0.1]], 24)
TREES = {"n=1": ROOT_ONLY, "chain-4": chain(4), "full": full((2, 2, 2)), "sparse": SPARSE}
CAPTURES = {"anew": lambda: None, "recorded": Recorded}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("kind", ["llama", "gqa", "gpt2", "opt"])
def test_static_shapes_give_the_text_of_the_growing_cache(kind: str, shape: str, capture: str) -> None:
    base, tree, limits = tiny.base(kind), TREES[shape], Limits(40)
    want = baseline(EagerRunner(base), PROMPT, limits)
    runner = StaticRunner(base, CAPTURES[capture](), span=16)
    assert baseline(runner, PROMPT, limits).tokens == want.tokens
    text = [*PROMPT, *want.tokens]
    spec = HeadSpec("shared", 4, 1, conditioned=True, keep=tuple(range(0, tiny.VOCAB, 2)))
    for drafter in (
        HeadDrafter(tiny.random_heads(base, spec)),
        tiny.TensorOracle(text),
        tiny.Oracle(text),
        tiny.Always(0),
        PromptLookup() if shape in ("n=1", "chain-4") else tiny.Always(1),
    ):
        got = medusa(runner, drafter, tree, PROMPT, limits)
        assert got.tokens == want.tokens
        assert sum(got.emitted) == len(got.tokens) - 1
        if isinstance(drafter, tiny.TensorOracle | tiny.Oracle) and tree.nodes > 1:
            assert got.steps < 0.7 * want.steps


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("kind", ["llama", "gqa", "mqa", "gpt2", "opt", "partial-rotary"])
def test_the_static_cache_after_many_scattered_paths_equals_a_fresh_prefill(kind: str, capture: str) -> None:
    base, limits = tiny.base(kind), Limits(50)
    text = [*PROMPT, *baseline(EagerRunner(base), PROMPT, limits).tokens]
    runner = StaticRunner(base, CAPTURES[capture](), span=32)
    trace = medusa(runner, tiny.TensorOracle(text), full((3, 3)), PROMPT, limits)
    assert any(path != tuple(range(len(path))) for path in trace.paths)
    fresh = EagerRunner(base)
    fresh.prefill(text[: runner.length])
    theirs = torch.cat([tensor for layer in fresh.cache.layers for tensor in (layer.keys, layer.values)])
    torch.testing.assert_close(runner.cache.rows[:, :, : runner.length], theirs, atol=1e-4, rtol=1e-4)


def test_one_runner_serves_prompts_of_any_length_one_after_another() -> None:
    base, capture = tiny.base("gqa"), Recorded()
    runner = StaticRunner(base, capture, span=16)
    for length in (3, 70, 1, 20, 100, 5):
        prompt = [(index * 37 + length) % 290 for index in range(length)]
        want = baseline(EagerRunner(base), prompt, Limits(25))
        drafter = tiny.TensorOracle([*prompt, *want.tokens])
        assert baseline(runner, prompt, Limits(25)).tokens == want.tokens
        assert medusa(runner, drafter, SPARSE, prompt, Limits(25)).tokens == want.tokens
    captured = capture.captures
    baseline(runner, PROMPT, Limits(25))
    assert capture.captures == captured, "a shape that is known is not recorded again"


@pytest.mark.parametrize("rule", [Greedy(), Typical(temperature=3.0), Exact(seed=5, temperature=2.0)])
def test_every_rule_takes_the_same_paths_as_on_the_growing_cache(rule: Any) -> None:
    base, limits = tiny.base("llama"), Limits(30)
    text = [*PROMPT, *baseline(EagerRunner(base), PROMPT, limits, rule).tokens]
    for runner in (StaticRunner(base, span=16), StaticRunner(base, Recorded(), span=16)):
        got = medusa(runner, tiny.TensorOracle(text), SPARSE, PROMPT, limits, rule)
        want = medusa(EagerRunner(base), tiny.TensorOracle(text), SPARSE, PROMPT, limits, rule)
        assert got.tokens == want.tokens
        assert got.paths[:-1] == want.paths[:-1]  # the last may run on past the limit, unseen


def test_a_recording_refuses_what_a_graph_would_refuse() -> None:
    held = torch.zeros(1)
    for body in (lambda: held.item(), lambda: held + torch.tensor([1.0]), lambda: held.nonzero()):
        with pytest.raises(RuntimeError, match="the host"):
            Recorded()(body, (held,))


def test_nothing_is_recorded_while_the_clock_runs() -> None:
    base, capture, limits = tiny.base("llama"), Recorded(), Limits(60)
    runner = StaticRunner(base, capture, span=16)
    for drafter, tree, rule in (
        (None, ROOT_ONLY, Greedy()),
        (tiny.TensorOracle(range(99)), SPARSE, Greedy()),
        (PromptLookup(), chain(4), Greedy()),
        (tiny.TensorOracle(range(99)), full((2, 2)), Exact()),
    ):
        runner.prepare(drafter, tree, rule, range(len(PROMPT), len(PROMPT) + limits.max_new_tokens))
        captured = capture.captures
        if drafter is None:
            baseline(runner, PROMPT, limits, rule)
        else:
            medusa(runner, drafter, tree, PROMPT, limits, rule)
        assert capture.captures == captured


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("left", [1, 2, 3, 9])
def test_at_the_end_of_the_context_static_decoding_stays_exact_and_stops(left: int, capture: str) -> None:
    base = tiny.base("gpt2")
    assert base.max_positions is not None
    prompt = [(index * 37) % 290 for index in range(base.max_positions - left)]
    want = baseline(EagerRunner(base), prompt, Limits(50))
    runner = StaticRunner(base, CAPTURES[capture]())
    for got in (
        baseline(runner, prompt, Limits(50)),
        medusa(runner, tiny.TensorOracle([*prompt, *want.tokens]), full((2, 2, 2)), prompt, Limits(50)),
    ):
        assert (got.tokens, got.finish) == (want.tokens, "context")


@pytest.mark.parametrize("tokens", range(1, 7))
def test_stops_and_limits_inside_a_path_cut_the_text_as_they_do_elsewhere(tokens: int) -> None:
    base = tiny.base("gqa")
    text = baseline(EagerRunner(base), PROMPT, Limits(30)).tokens
    for limits in (Limits(tokens), Limits(30, frozenset({text[tokens]}))):
        want = baseline(EagerRunner(base), PROMPT, limits)
        got = medusa(StaticRunner(base), tiny.TensorOracle([*PROMPT, *text]), chain(4), PROMPT, limits)
        assert (got.tokens, got.finish) == (want.tokens, want.finish)


def test_states_that_are_kept_are_those_of_each_step() -> None:
    base, limits = tiny.base("llama"), Limits(20)
    want = baseline(EagerRunner(base), PROMPT, limits, keep_hidden=True)
    got = baseline(StaticRunner(base, Recorded()), PROMPT, limits, keep_hidden=True)
    torch.testing.assert_close(torch.stack(got.hidden), torch.stack(want.hidden), atol=1e-4, rtol=1e-4)


@st.composite
def verified_trees(draw: st.DrawFn) -> tuple[Tree, list[int], list[int]]:
    """A tree, the tokens of its nodes and the base's choices after them, few enough to meet often."""
    paths: set[tuple[int, ...]] = set()
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from([(), *sorted(paths)]))
        paths.add((*parent, sum(1 for path in paths if path[:-1] == parent and len(path) == len(parent) + 1)))
    tokens = st.lists(st.integers(0, 2), min_size=len(paths) + 1, max_size=len(paths) + 1)
    return Tree(tuple(paths)), draw(tokens), draw(tokens)


@given(verified_trees())
@settings(max_examples=300)
def test_the_path_found_without_the_host_is_that_of_the_walk(drawn: tuple[Tree, list[int], list[int]]) -> None:
    tree, tokens, best = drawn
    logits = torch.nn.functional.one_hot(torch.tensor(best), 3).float()
    want, following = Greedy().accept(tree, tokens, logits, 5)
    path, accepted = DeviceTree(tree, torch.device("cpu")).greedy_path(torch.tensor(tokens), torch.tensor(best))
    assert tuple(path[: int(accepted) + 1].tolist()) == want
    assert best[want[-1]] == following
    assert path[int(accepted) + 1 :].tolist() == list(range(len(want), tree.max_depth + 1))


@given(st.integers(0, 8), st.integers(1, 6), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 12)))
def test_the_mask_is_cut_from_one_strip(length: int, nodes: int, tiles: int, window: int | None) -> None:
    tree, span = SPARSE.first(nodes), 16
    strip = DeviceTree(tree, torch.device("cpu")).mask_strip(span, torch.float32, tiles, window)
    seen = strip[:, span - length : 2 * span - length] == 0
    at = [*range(length), *(length + depth for depth in tree.depth)]  # the position of each column
    for node in range(tree.nodes):
        known = {*range(length), *(length + above for above in tree.ancestors(node))}
        near = {column for column in known if window is None or at[length + node] - at[column] < window}
        for tile in range(tiles):
            assert set(seen[tile * tree.nodes + node].nonzero()[:, 0].tolist()) == near


def test_the_cost_of_passes_is_measured_on_static_shapes_too_and_leaves_the_cache_as_it_was() -> None:
    base = tiny.base("gqa")
    runner = StaticRunner(base, Recorded())
    curve = cost_curve(runner, tiny.random_heads(base, HeadSpec(heads=3)), 40, widths=(1, 4, 8), repeats=1)
    assert [width for width, _ in curve.points] == [1, 4, 8]
    assert runner.length == 40 and min(ms for _, ms in curve.points) > 0
    runner.rewind(33)
    want = baseline(EagerRunner(base), [index % base.vocab for index in range(7)], Limits(5)).tokens
    _, logits = runner.forward(torch.tensor([want[0]]), ROOT_ONLY)
    assert int(logits[0].argmax()) == want[1]


def test_logits_that_are_not_finite_end_a_static_step_with_its_number() -> None:
    model = tiny.model("llama")
    base = Base(model, tiny.tokenizer())
    text = baseline(EagerRunner(base), PROMPT, Limits(9)).tokens
    new = next(at for at in range(1, 8) if text[at] not in {*PROMPT, *text[:at]})
    with torch.no_grad():
        model.get_input_embeddings().weight[text[new]] = float("nan")
    with pytest.raises(EvaluationError, match=f"NaN or infinity at decoding step {new + 1}"):
        baseline(StaticRunner(base, Recorded()), PROMPT, Limits(9))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mamba", "MambaForCausalLM uses the cache layer LinearAttentionLayer"),
        ("gemma3n", "Gemma3nForCausalLM uses the cache layer DummyLayer"),
        ("bloom", "BloomForCausalLM does not run with static shapes"),
        ("dynamic", "LlamaForCausalLM changes its rotary angles"),
        ("phi3-longrope", "Phi3ForCausalLM changes its rotary angles"),
    ],
)
def test_a_model_that_cannot_run_statically_says_why(kind: str, says: str) -> None:
    reason = reason_against_static(tiny.base(kind), Recorded())
    assert reason is not None and reason.startswith(says) and reason.endswith(".")
    assert EagerRunner(tiny.base(kind), reason).execution == f"eager: {reason}"


@pytest.mark.parametrize("kind", ["window", "gemma2", "gemma3", "cohere2", "qwen2-window", "gpt-oss", "longrope"])
def test_windows_mixed_layers_and_a_change_of_angles_need_no_host(kind: str) -> None:
    base, limits = tiny.base(kind), Limits(40)
    assert reason_against_static(base, Recorded()) is None
    want = baseline(EagerRunner(base), PROMPT, limits)
    runner = StaticRunner(base, Recorded(), span=16)
    assert baseline(runner, PROMPT, limits).tokens == want.tokens
    got = medusa(runner, tiny.TensorOracle([*PROMPT, *want.tokens]), SPARSE, PROMPT, limits)
    assert got.tokens == want.tokens and got.steps < 0.8 * want.steps


def test_models_that_can_are_found_by_trying_them() -> None:
    for kind in ("llama", "gqa", "gpt2", "opt", "partial-rotary"):
        assert reason_against_static(tiny.base(kind), Recorded()) is None
    assert fastest(tiny.base("llama")).execution == "eager", "without a GPU the growing cache stays"


@pytest.mark.parametrize("kind", ["gqa", "mqa", "window", "gemma3"])
def test_grouped_attention_gives_the_text_and_the_logits_of_repeated_keys(kind: str) -> None:
    base, limits = Base(tiny.model(kind), tiny.tokenizer()), Limits(30)
    want = baseline(EagerRunner(base), PROMPT, limits)
    eager = EagerRunner(base)
    eager.prefill(PROMPT)
    tokens = torch.arange(SPARSE.nodes)
    _, repeated = eager.forward(tokens, SPARSE)
    use_grouped(base)
    assert base.model.config._attn_implementation == GROUPED and reason_against_trees(base) is None
    for runner in (EagerRunner(base), StaticRunner(base), StaticRunner(base, Recorded())):
        runner.prefill(PROMPT)
        torch.testing.assert_close(runner.forward(tokens, SPARSE)[1], repeated, atol=1e-4, rtol=1e-4)
        got = medusa(runner, tiny.TensorOracle([*PROMPT, *want.tokens]), SPARSE, PROMPT, limits)
        assert got.tokens == want.tokens


def test_grouped_attention_leaves_alone_what_is_not_grouped() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 3, 8, generator=generator) for _ in range(3))
    mask = torch.zeros(1, 1, 3, 3)
    out, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.slow
def test_a_report_says_how_its_passes_were_run(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("gqa"))
    measured = evaluator.measure(
        folder, tmp_path / "out", evaluator.SpeedOptions(budget_s=6, questions=2, runner=StaticRunner)
    )
    assert measured["environment"]["execution"] == "static"
    assert measured["environment"]["attention"] == GROUPED
    assert measured["candidates"][0]["id"] == "none" and measured["plain"]["tokens_per_s"] > 0
