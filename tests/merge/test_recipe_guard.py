"""Texts made to hurt the parser are stopped early, reliability.md 3.1."""

from __future__ import annotations

import time

import pytest

from bot.errors import Refused
from bot.merge.recipe import reading as recipe


def _nested_aliases(levels: int) -> str:
    lines = ["a0: &a0 [" + ",".join(["x"] * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "nested aliases": (_nested_aliases(7), "RECIPE_USES_ALIASES"),
    "deep lists": ("[" * 32_000, "RECIPE_TOO_DEEP"),
    "deep maps": ("\n".join(" " * i + "a:" for i in range(300)), "RECIPE_TOO_DEEP"),
    "too long": ("a: " + "x" * 70_000, "RECIPE_TOO_LARGE"),
    "too many": ("- x\n" * 15_999 + "- " * 8, "RECIPE_INVALID"),
    "a tag": ("a: !!binary aGFsbG8=", "RECIPE_INVALID"),
    "a tagged list": ("!!python/object/apply:os.system [x]", "RECIPE_INVALID"),
    "a recursive alias": ("a: &a [*a]", "RECIPE_INVALID"),
    "an alias to nothing": ("a: *b", "RECIPE_INVALID"),
    "NUL": ("a: \0", "RECIPE_INVALID"),
    "an escape sequence": ("a: \x1b[31m", "RECIPE_INVALID"),
    "a byte order mark": ("\ufeffa: b", "RECIPE_INVALID"),
    "a list as key": ("? [a, b]\n: c", "RECIPE_INVALID"),
    "a merged block": ("a: &a {x: 1}\nb: {<<: *a}", "RECIPE_USES_ALIASES"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly(name: str) -> None:
    text, code = BOMBS[name]
    started = time.process_time()
    with pytest.raises(Refused) as caught:
        recipe.parse(text, trust="stranger")
    assert caught.value.code == code
    assert time.process_time() - started < 1.0


def test_a_flood_of_small_entries_is_refused_by_count() -> None:
    with pytest.raises(Refused) as caught:
        recipe.parse("- \n" * 21_000, trust="stranger")
    assert caught.value.code == "RECIPE_TOO_LARGE"


def test_the_operator_may_use_a_few_small_aliases_but_no_bomb() -> None:
    models = "models: [{model: a, parameters: *p}, {model: b, parameters: {<<: *p}}]"
    text = f"p: &p {{weight: 0.5}}\nmerge_method: linear\n{models}"
    parsed = recipe.parse(text)
    assert [source.parameters["weight"] for source in parsed.modules[0].slices[0].sources] == [0.5, 0.5]
    with pytest.raises(Refused) as caught:
        recipe.parse(_nested_aliases(9))
    assert caught.value.code == "RECIPE_USES_ALIASES"
