"""Trees: the published numbering and growth order, and what is not a tree."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.errors import EvaluationError
from evaluators.medusa.trees import tree_files
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree, chain, expected_tokens, full, greedy_tree, grow

CUMULATIVE = (
    (0.560, 0.672, 0.727, 0.760, 0.780),
    (0.316, 0.424, 0.485, 0.528, 0.562),
    (0.201, 0.288, 0.348, 0.383, 0.417),
    (0.147, 0.225, 0.274, 0.311, 0.340),
    (0.118, 0.187, 0.235, 0.272, 0.300),
)
PUBLISHED = [[row[0], *(right - left for left, right in itertools.pairwise(row))] for row in CUMULATIVE]


def test_a_small_tree_has_the_published_parents_depths_and_picks() -> None:
    tree = Tree(((0, 1), (0,), (1, 0), (1,), (0, 0), (9,), (9, 9)))
    assert tree.topk == 10
    small = tree.first(4)
    assert small.paths == ((0,), (1,), (9,))
    golden = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
    assert golden.parent == (-1, 0, 0, 1, 1, 2)
    assert golden.depth == (0, 1, 1, 2, 2, 2)
    # The reference counts the root as index 0 and always has ten ranks a head.
    picks = [10 * (len(path) - 1) + path[-1] + 1 for path in golden.paths]
    assert [0, *picks] == [0, 1, 2, 11, 12, 11]
    assert golden.pick == tuple(golden.topk * (len(path) - 1) + path[-1] for path in golden.paths)
    leaves = [node for node in range(golden.nodes) if not golden.children[node]]
    assert {golden.ancestors(leaf) for leaf in leaves} == {(0, 2, 5), (0, 1, 4), (0, 1, 3)}


def test_the_published_accuracies_grow_the_published_tree() -> None:
    grown = grow(PUBLISHED, 63)
    order = [path for path, _ in grown[:11]]
    assert order == [(0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2), (3,), (0, 3), (4,)]
    for nodes, expected in ((2, 1.560), (4, 1.849), (8, 2.035), (16, 2.211), (32, 2.317), (64, 2.384)):
        assert 1 + sum(value for _, value in grown[: nodes - 1]) == pytest.approx(expected, abs=6e-4)
        assert expected_tokens(PUBLISHED, greedy_tree(PUBLISHED, nodes)) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (((0, 0),), "has no parent"),
        (((0,), (0,)), "given twice"),
        (((),), "is the root"),
        (((-1,),), "not an integer from 0"),
    ],
)
def test_what_is_no_tree_is_refused_with_the_path(paths: tuple[tuple[int, ...], ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Tree(paths)


def test_a_tree_deeper_than_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="4 levels deep, but there are only 3 heads"):
        chain(4).check_fits(3)


def test_shapes_have_the_sizes_they_are_named_for() -> None:
    assert (ROOT_ONLY.nodes, chain(4).nodes, full((2, 2, 2)).nodes, full((3, 3, 3)).nodes) == (1, 5, 15, 40)
    assert full((2, 2, 2)).shallow(1).paths == ((0,), (1,))
    assert chain(3).shallow(0).nodes == 1


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_growth_is_prefix_closed_and_every_prefix_of_it_is_the_best_of_its_size(
    accuracy: list[list[float]], nodes: int
) -> None:
    accuracy = [sorted(row, reverse=True) for row in accuracy]
    grown = grow(accuracy, nodes)
    values = [value for _, value in grown]
    assert values == sorted(values, reverse=True)
    tree = Tree(tuple(path for path, _ in grown))
    visible = tree.visible()
    for node in range(tree.nodes):
        assert [column for column, seen in enumerate(visible[node]) if seen] == sorted(tree.ancestors(node))


# The first paths of FasterDecoding/Medusa, medusa_choices.py, in the order in which they are published.
PUBLISHED_CHOICES = "mc_sim_7b_63 = [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 3], [4]]"


@pytest.mark.parametrize(
    "text",
    [
        PUBLISHED_CHOICES,
        PUBLISHED_CHOICES.partition("= ")[2],
        PUBLISHED_CHOICES.replace("[0]", "(0,)").replace("[0, 0]", "(0, 0)") + "  # a comment\n",
        '"""Choices."""\nchoices: list = ' + PUBLISHED_CHOICES.partition("= ")[2],
    ],
)
def test_a_published_list_of_paths_is_the_tree_it_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "choices.py").write_text(text)
    tree = tree_files.read(tmp_path / "choices.py")
    assert tree.nodes == 12 and tree.max_depth == 3
    assert set(tree.paths) == {path for path, _ in grow(PUBLISHED, 11)}


def test_one_of_several_published_lists_is_named_behind_a_colon(tmp_path: Path) -> None:
    (tmp_path / "medusa_choices.py").write_text(f"{PUBLISHED_CHOICES}\nvicuna_7b_stage2 = [(0,), (0, 0)]\n")
    assert tree_files.read(tmp_path / "medusa_choices.py:vicuna_7b_stage2").paths == ((0,), (0, 0))
    assert tree_files.read(tmp_path / "medusa_choices.py:mc_sim_7b_63").nodes == 12
    with pytest.raises(EvaluationError, match="name one of mc_sim_7b_63, vicuna_7b_stage2 behind a colon"):
        tree_files.read(tmp_path / "medusa_choices.py")
    with pytest.raises(EvaluationError, match="0 lists zephyr where one is a tree: name one of mc_sim_7b_63"):
        tree_files.read(tmp_path / "medusa_choices.py:zephyr")


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(2, 30),
)
def test_any_tree_comes_back_from_its_file(tmp_path_factory: pytest.TempPathFactory, accuracy: list[list[float]],
                                           nodes: int) -> None:  # fmt: skip
    tree = greedy_tree(accuracy, nodes)
    path = tmp_path_factory.mktemp("trees") / "tree.json"
    path.write_text(json.dumps(tree.paths[::-1]))
    assert tree_files.read(path).paths == tree.paths


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[0], [0, 0], [1, 0]]", r"path \(1, 0\) has no parent"),
        ("[[0], [0]]", "given twice"),
        ("[[0], []]", "the empty path is the root"),
        ("[[-1]]", "not an integer from 0"),
        ("[[0], [true]]", "line 1 says something else than numbers"),
        ("[[0], [True]]", "is not a list of ranks"),
        ("[0, 1]", "0 is not a list of ranks"),
        ("{}", "it holds 0 lists"),
        ("a = [[0]]\nb = [[1]]", "it holds 2 lists"),
        ("[]", "its list is empty"),
        ("", "it holds 0 lists"),
        ("[[0], [999999]]", "rank 999999 is larger than 255"),
        (str([[0] * depth for depth in range(1, 18)]), "17 levels deep, more than 16"),
        (str([[rank] for rank in range(513)]), "513 paths, more than 512"),
        ("__import__('os').system('touch ran')", "line 1 says something else"),
        ("[[0], [__import__('os').getpid()]]", "line 1 says something else"),
        ("[" * 20000, "neither JSON nor a Python list"),
        ("-" * 60000 + "1", "no tree"),
        ("[[0], {[]: 1}]", "line 1 says something else"),
        ("[[0], [" + "9" * 5000 + "]]", "neither JSON nor a Python list"),
        ("[[0]", "neither JSON nor a Python list"),
        ("\x00", "no tree"),
        (" " * 70000, "larger than 64 KiB"),
    ],
)
def test_what_is_no_tree_in_a_file_is_said_in_a_sentence(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(EvaluationError, match=says) as refused:
        tree_files.read(tmp_path / "tree.json")
    assert refused.value.code == "SPEED_CHECK_FAILED" and refused.value.message.endswith(".")
    assert "\n" not in refused.value.message and len(refused.value.message) < 200
    with pytest.raises(EvaluationError, match="There is no tree file"):
        tree_files.read(tmp_path / "absent.json")
