"""A recipe of several documents: names, order, limits, and the same recipe back from what is written of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.errors import Refused
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.spec import ModelRef, Recipe


def document(*models: str, name: str | None = None, base: str | None = None) -> str:
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: 1}}}}" for model in models)
    head = "" if name is None else f"name: {name}\n"
    method = "linear" if base is None else f"ties\nbase_model: {base}"
    return f"{head}merge_method: {method}\nmodels: [{listed}]\n"


def stream(*documents: str) -> str:
    return "---\n".join(documents)


def order(parsed: Recipe) -> list[str]:
    return [stage.name for stage in parsed.stages]


def refusal(text: str) -> Refused:
    with pytest.raises(Refused) as caught:
        recipe.parse(text)
    assert caught.value.next_step
    return caught.value


def test_the_unnamed_document_is_the_result_and_the_named_ones_stand_for_models() -> None:
    text = stream(
        document("o/a", "two", "one"),
        document("o/c", "one", name="two", base="o/b"),
        document("o/a", "o/b", name="one"),
    )
    for trust in ("operator", "stranger"):
        parsed = recipe.parse(text, trust=trust)  # type: ignore[arg-type]
        assert order(parsed) == ["one", "two"]
        assert parsed.sources == (ModelRef("o/a"), ModelRef("two"), ModelRef("one"))
        assert [str(ref) for ref in parsed.repos] == ["o/a", "o/b", "o/c"]


def test_where_every_document_has_a_name_the_last_unused_one_is_the_result() -> None:
    text = stream(document("o/a", name="x"), document("x", "o/b", name="y"), document("x", "o/c", name="z"))
    parsed = recipe.parse(text)
    assert [str(ref) for ref in parsed.sources] == ["x", "o/c"]
    assert order(parsed) == ["x"]
    assert "`y`" in next(notice.text for notice in parsed.notices if notice.code == "UNUSED_DOCUMENT")


def test_pinning_reaches_into_the_stages_and_leaves_their_names_alone() -> None:
    parsed = recipe.parse(stream(document("o/a", "o/b", name="one"), document("one", "o/a+o/l")))
    pinned = parsed.pinned({ref: ModelRef(ref.path, "1" * 40) for ref in parsed.repos})
    assert {ref.revision for ref in pinned.repos} == {"1" * 40}
    assert ModelRef("one") in pinned.sources
    assert pinned.digest != parsed.digest
    assert recipe.from_canonical(pinned.canonical()) == pinned


def test_the_digest_covers_the_stages_but_not_the_name_of_the_result() -> None:
    first = document("o/a", "o/b", name="one")
    plain = recipe.parse(stream(first, document("one", "o/c")))
    assert recipe.parse(stream(first, document("one", "o/c", name="result"))).digest == plain.digest
    assert recipe.parse(stream(first.replace("o/b", "o/d"), document("one", "o/c"))).digest != plain.digest


@pytest.mark.parametrize(
    ("documents", "code", "said"),
    [
        ((document("o/a"), document("o/b")), "MISSING_KEY", "lines 1 and 4"),
        ((document("o/a", name="x"), document("o/b", name="x"), document("x")), "DUPLICATE_KEY", "`x`"),
        ((document("y", name="x"), document("x", name="y"), document("x")), "RECIPE_INVALID", "`x` -> `y` -> `x`"),
        ((document("x", name="x"), document("x")), "RECIPE_INVALID", "`x` -> `x`"),
        ((document("x", name="y"), document("y", name="x")), "RECIPE_INVALID", "circle"),
        ((document("o/a", name="x@1"), document("o/b")), "RECIPE_INVALID", "`x@1`"),
        ((document("o/a", name="x"), document("o/b+x")), "RECIPE_INVALID", "as an adapter"),
        ((*(document("o/a", name=f"s{i}") for i in range(8)), document("s0")), "RECIPE_TOO_LARGE", "9 documents"),
        ((document("o/a", name="x"), document("x").replace("weight", "wieght")), "UNKNOWN_KEY", "line 6"),
    ],
)
def test_documents_that_do_not_fit_together_are_refused(documents: tuple[str, ...], code: str, said: str) -> None:
    error = refusal(stream(*documents))
    assert error.code == code
    assert said in error.message


def test_empty_documents_and_a_name_without_need_change_nothing() -> None:
    alone = recipe.parse(document("o/a", "o/b"))
    for text in ("---\n# nothing\n---\n" + document("o/a", "o/b") + "---\n", document("o/a", "o/b", name="mine")):
        assert recipe.parse(text) == alone


def test_anchors_end_with_their_document() -> None:
    first = document("o/a", name="x").replace("weight: 1", "weight: &w 1")
    assert refusal(stream(first, document("x").replace("weight: 1", "weight: *w"))).code == "RECIPE_INVALID"


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=2, max_size=6))
def test_every_stage_comes_after_those_it_uses_and_the_text_comes_back(uses: list[list[int]]) -> None:
    """Document i may use only earlier ones here, so every drawn recipe is in order; it is written shuffled."""
    texts = [
        document("o/a", *(f"s{j}" for j in sorted(set(some)) if j < i), name=f"s{i}" if i < len(uses) - 1 else None)
        for i, some in enumerate(uses)
    ]
    parsed = recipe.parse(stream(*reversed(texts)))
    seen: set[str] = set()
    for stage in parsed.stages:
        assert {ref.path for ref in stage.recipe.sources} <= seen | {"o/a"}
        seen.add(stage.name)
    assert {ref.path for ref in parsed.sources} <= seen | {"o/a"}
    assert recipe.from_canonical(parsed.canonical()) == parsed
    assert recipe.parse(recipe.write_yaml(parsed.document())) == parsed
