"""A form or a card becomes a request, or one sentence with the line and the next step."""

from __future__ import annotations

import pytest
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import given
from hypothesis import strategies as st

from bot.errors import MergebotError, Refused
from bot.jobs.request import EvaluateOptions, from_card, from_form, front_matter, read_block
from bot.localhub.metadata import split_card
from bot.merge.recipe import reading as recipe

RECIPE = """merge_method: linear
models:
- {model: org/a, parameters: {weight: 1}}
- {model: org/b, parameters: {weight: 1}}
"""


def card(block: str) -> str:
    return f"---\ntags: [mergebot]\n{block}---\n# A card\n"


def test_a_card_with_its_recipe_in_a_file_names_the_file() -> None:
    block = read_block(card("mergebot:\n  version: 1\n"))
    assert (block.recipe, block.recipe_path) == (None, "mergekit_config.yml")
    assert block.evaluate == EvaluateOptions()
    assert block.enabled


def test_a_card_with_its_recipe_inside_means_the_same_as_the_file() -> None:
    inside = "".join(f"    {line}\n" for line in RECIPE.splitlines())
    block = read_block(card(f"mergebot:\n  version: 1\n  recipe:\n{inside}"))
    assert block.recipe is not None
    assert recipe.parse(block.recipe, trust="stranger").digest == recipe.parse(RECIPE, trust="stranger").digest


def test_every_option_of_the_block_is_read() -> None:
    block = read_block(
        card(
            "mergebot:\n  version: 1\n  run: 3\n  recipe: sub/r.yml\n"
            "  evaluate: {suite: full, limit: 20, speed: medusa}\n"
            "  deliver: {to: repo, name: my-merge}\n  reply: none\n  enabled: no\n"
        )
    )
    request = from_card("alice/asks", "a" * 40, block, RECIPE)
    assert (block.recipe_path, block.enabled) == ("sub/r.yml", False)
    assert request.evaluate == EvaluateOptions(suite="full", limit=20, speed="medusa")
    assert (request.requester, request.name, request.run, request.reply) == ("alice", "my-merge", 3, "none")


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("# no metadata", "CARD_NO_REQUEST", "no metadata"),
        (card("license: mit\n"), "CARD_NO_REQUEST", "no `mergebot:` block"),
        (card("mergebot: {version: 2}\n"), "CARD_INVALID", "version"),
        (card("mergebot: {version: 1, evalute: {suite: quick}}\n"), "UNKNOWN_KEY", "evaluate"),
        (card("mergebot: {version: 1, evaluate: {speed: fast}}\n"), "CARD_INVALID", "fast"),
        (card("mergebot: {version: 1, evaluate: {limit: 0}}\n"), "REQUEST_INVALID", "0 samples"),
        (card("mergebot: {version: 1, recipe: ../../etc/passwd}\n"), "CARD_INVALID", "leaves the repo"),
        (card("mergebot: {version: 1, version: 1}\n"), "DUPLICATE_KEY", "version"),
        (card("mergebot: !!python/object:os.system {}\n"), "RECIPE_INVALID", ""),
    ],
)
def test_a_bad_card_gets_one_sentence(text: str, code: str, said: str) -> None:
    with pytest.raises(Refused) as refused:
        read_block(text)
    assert refused.value.code == code
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["", "a--b", "../x", "x.git", "-x", "a b", "x" * 97, "a/b", "ü"])
def test_a_name_no_repo_can_have_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="not a repo name"):
        from_form("alice", RECIPE, name, EvaluateOptions())


def test_forms_are_bounded() -> None:
    with pytest.raises(Refused) as refused:
        from_form("alice", "x" * 65537, "n", EvaluateOptions())
    assert refused.value.code == "RECIPE_TOO_LARGE"
    with pytest.raises(Refused, match="empty"):
        from_form("alice", "  \n", "n", EvaluateOptions())


def test_the_key_changes_with_what_is_asked_and_with_nothing_else() -> None:
    one = from_form("alice", RECIPE, "n", EvaluateOptions())
    assert one.key == from_form("alice", RECIPE, "n", EvaluateOptions()).key
    others = (
        from_form("bob", RECIPE, "n", EvaluateOptions()),
        from_form("alice", RECIPE + "#", "n", EvaluateOptions()),
        from_form("alice", RECIPE, "m", EvaluateOptions()),
        from_form("alice", RECIPE, "n", EvaluateOptions(speed="medusa")),
    )
    assert len({one.key, *(other.key for other in others)}) == 5


def test_prose_of_a_card_does_not_change_the_request() -> None:
    block = read_block(card("mergebot: {version: 1}\n"))
    again = read_block(card("mergebot: {version: 1}\n") + "More prose.\n")
    first, second = from_card("alice/x", "a" * 40, block, RECIPE), from_card("alice/x", "b" * 40, again, RECIPE)
    assert first.key == second.key


@given(st.text(max_size=400))
def test_no_card_text_brings_the_parser_down(text: str) -> None:
    for whole in (text, card(f"mergebot:\n{text}\n"), f"---\n{text}\n---\n"):
        try:
            read_block(whole)
        except MergebotError as refused:
            assert refused.message


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["\n" * 1_000_000, "\n\n---x" * 160_000, "\n--- " + " \t" * 500_000 + "x"])
def test_a_card_of_a_megabyte_that_never_ends_its_block_is_read_in_linear_time(text: str) -> None:
    """The time of the pattern before was cubic: 400 empty lines took 0.05 s, ten thousand take minutes."""
    with pytest.raises(Refused, match="no metadata block"):
        read_block(f"---\n{text}")
    assert split_card(f"---\n{text}")[0] is None


@given(st.text(alphabet="-\n\r a:", max_size=30))
def test_the_metadata_of_a_card_are_those_that_huggingface_hub_finds(text: str) -> None:
    theirs = REGEX_YAML_BLOCK.match(f"---\n{text}")
    assert split_card(f"---\n{text}")[0] == (theirs and theirs.group(2))
    assert (front_matter(f"---\n{text}") or "").lstrip("\n") == (theirs.group(2).lstrip("\n") if theirs else "")
