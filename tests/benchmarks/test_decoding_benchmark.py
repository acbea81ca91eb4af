"""The decoding benchmark measures what it says: here on a tiny model without a GPU, from the options to the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import decoding
from benchmarks.report import Results
from benchmarks.sections import section, with_section
from benchmarks.simulated import PUBLISHED, SHAPES, SimulatedDrafter, real_heads, shares, simulated
from evaluators.medusa.decoding.decode import Limits, baseline
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.trees.tree import expected_tokens, full, greedy_tree

CPU = torch.device("cpu")
TINY = ["--shape", "tiny", "--device", "cpu"]


def test_the_benchmark_runs_from_its_options_to_its_section_of_the_page(tmp_path: Path) -> None:
    out = tmp_path / "RESULTS.md"
    out.write_text("# Merges\n\nAll of this stays.\n")
    sizes = ["--prompts", "2", "--prompt-tokens", "9", "--tokens", "24", "--dtype", "float32"]
    assert decoding.main([*TINY, *sizes, "--out", str(out)]) == 0
    page = out.read_text()
    assert page.startswith("# Merges\n\nAll of this stays.\n")
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| .* \| (\d+) of 4 \|$", page, re.MULTILINE)
    assert [int(nodes) for nodes, *_ in rows] == list(decoding.NODES)
    assert all(equal == "4" for *_, equal in rows)
    assert float(rows[0][2]) == 1.0 and float(rows[-1][2]) > 1.5
    assert re.search(r"^\| plain loop, growing cache, eager \| [\d.]+ \|$", page, re.MULTILINE)
    assert re.search(r"^\| generate \| [\d.]+ \|$", page, re.MULTILINE)
    assert decoding.main([*TINY, *sizes, "--no-others", "--out", str(out)]) == 0
    assert out.read_text().count("## Decoding") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decoding.main(["--out", str(tmp_path / "page.md")]) == decoding.NO_GPU
    assert "No CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "page.md").exists()


def test_a_folder_without_a_model_is_a_sentence_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(tmp_path), "--heads", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "page.md")]
    assert decoding.main(given) == decoding.FAILED
    assert "holds no config.json" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_of_a_made_model_is_known_and_no_rounding_changes_it(dtype: torch.dtype) -> None:
    model = simulated(SHAPES["tiny"], CPU, dtype)
    for prompt in ([3, 99, 7], [500], [1, 2, 3, 4, 5]):
        assert baseline(EagerRunner(model.base), prompt, Limits(60)).tokens == model.text(prompt[-1], 60)
    assert len(set(model.text(0, SHAPES["tiny"].vocabulary))) == SHAPES["tiny"].vocabulary, "it never repeats itself"


def test_simulated_guesses_are_right_as_often_as_asked() -> None:
    model = simulated(SHAPES["tiny"], CPU, torch.float32)
    accuracy, tree = shares(0.75), full((5, 1, 1))
    drafter = SimulatedDrafter(model, real_heads(model.base, 64), accuracy)
    right = torch.zeros(tree.nodes - 1)
    for position in range(2000):
        truth = model.text(7, 3)
        guesses = drafter.propose(torch.zeros(64), 7, range(position + 1), tree)
        right += torch.tensor([int(guess) == truth[len(p) - 1] for guess, p in zip(guesses, tree.paths, strict=True)])
    want = torch.tensor([accuracy[len(path) - 1][path[-1]] for path in tree.paths])
    assert float((right / 2000 - want).abs().max()) < 0.04  # 3.6 standard deviations at one half


def test_the_accuracies_are_the_published_ones_and_with_fewer_misses_bring_what_the_goal_asks() -> None:
    assert shares(1.0)[0][0] == PUBLISHED[0][0]
    assert expected_tokens(shares(1.0), greedy_tree(shares(1.0), 64)) == pytest.approx(2.384, abs=6e-4)
    assert expected_tokens(shares(0.75), greedy_tree(shares(0.75), 64)) > 2.7


TEXT = st.text(alphabet="ab\n#", max_size=12)


@given(TEXT, TEXT, TEXT)
def test_a_section_is_replaced_where_it_stands_and_the_rest_is_left(page: str, first: str, second: str) -> None:
    once = with_section(page, "x", first)
    assert once.startswith(page.rstrip()) or not page.strip()
    after = with_section(f"{once}tail", "x", second)
    assert after == f"{with_section(page, 'x', second)}tail"
    assert second.strip() in section(after, "x") and section(after, "y") == ""


def test_the_merge_benchmark_keeps_the_section(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(with_section("# Old merges\n", "decoding", "## Decoding\n\nfigures"))
    options = dict.fromkeys(
        ("methods", "parameters", "parents", "repeat", "mergekit_repeat", "rows", "device", "budget_s")
    )
    Results.begin(None, options).write(page)
    assert "# Old merges" not in page.read_text()
    assert section(page.read_text(), "decoding").count("figures") == 1
