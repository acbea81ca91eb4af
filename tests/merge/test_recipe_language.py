"""What a recipe may say, and how a wrong one is answered."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.errors import Refused
from bot.merge.methods import KNOWN_PARAMETERS, METHODS, Absent, Parameter
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.parameters import at, position, resolve
from bot.merge.recipe.spec import Condition, Conditions, Gradient, ModelRef, Scalar
from bot.merge.recipe.suggestions import closest

LINEAR = (
    "merge_method: linear\nmodels:\n- model: o/a\n  parameters: {weight: 1}\n- model: o/b\n  parameters: {weight: 2}\n"
)


def refusal(text: str, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        recipe.parse(text, **options)
    assert caught.value.next_step, "every refusal offers a next step"
    return caught.value


def test_the_digest_does_not_depend_on_layout_comments_or_spelling_of_numbers() -> None:
    models = "{model: o/a, parameters: {weight: 1.0}}, {model: o/b, parameters: {weight: '2'}}"
    flow = f"{{merge_method: linear, models: [{models}]}}"
    assert recipe.parse(LINEAR).digest == recipe.parse("# a comment\n" + flow).digest
    assert recipe.parse(LINEAR).digest != recipe.parse(LINEAR.replace("weight: 2", "weight: 3")).digest


def test_a_recipe_survives_its_canonical_json_and_its_yaml() -> None:
    text = """
merge_method: ties
base_model: o/base@v1
slices:
- sources:
  - {model: o/base@v1, layer_range: [0, 2]}
  - model: o/a
    layer_range: [1, 3]
    parameters: {weight: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.25}], density: 1e-3}
parameters: {normalize: no, lambda: 1.5, int8_mask: true}
tokenizer: {source: union, pad_to_multiple_of: 64, tokens: {"<x>": {source: {kind: zero}, force: true}}}
dtype: torch.bfloat16
"""
    parsed = recipe.parse(text)
    assert recipe.from_canonical(parsed.canonical()) == parsed
    assert recipe.parse(recipe.write_yaml(parsed.document())) == parsed
    assert parsed.dtype == "bfloat16"
    assert parsed.parameters["normalize"] is False


def test_sources_come_in_recipe_order_once_and_can_be_pinned() -> None:
    parsed = recipe.parse(
        "merge_method: slerp\nbase_model: o/b\nmodels: [{model: o/a}, {model: o/b}]\nparameters: {t: 1}"
    )
    assert [str(ref) for ref in parsed.sources] == ["o/a", "o/b"]
    pinned = parsed.pinned({ref: ModelRef(ref.path, "1" * 40) for ref in parsed.sources})
    assert [ref.revision for ref in pinned.sources] == ["1" * 40] * 2
    assert pinned.base == ModelRef("o/b", "1" * 40)
    assert pinned.digest != parsed.digest


def test_a_model_and_its_adapter_are_fetched_and_pinned_apart() -> None:
    parsed = recipe.parse("""
merge_method: linear
models: [{model: o/a+o/l@v1}, {model: {model: {path: o/a}, lora: {path: o/m}}}, {model: o/a}]
parameters: {weight: 1}
""")
    assert [str(ref) for ref in parsed.sources] == ["o/a+o/l@v1", "o/a+o/m", "o/a"]
    assert [str(ref) for ref in parsed.repos] == ["o/a", "o/l@v1", "o/m"]
    assert all(ref.lora is None for ref in parsed.repos)
    pinned = parsed.pinned({ref: ModelRef(ref.path, ref.path[-1] * 40) for ref in parsed.repos})
    assert [str(ref) for ref in pinned.repos] == [f"o/{c}@{c * 40}" for c in "alm"]
    assert str(pinned.sources[0]) == f"o/a@{'a' * 40}+o/l@{'l' * 40}"
    assert recipe.from_canonical(pinned.canonical()) == pinned


def test_a_mistyped_parameter_is_refused_with_line_path_and_the_nearest_name() -> None:
    error = refusal(
        "merge_method: ties\nbase_model: o/b\nmodels:\n- model: o/a\n  parameters:\n    weight: 1\n    denstiy: 0.5\n"
    )
    assert error.code == "UNKNOWN_KEY"
    assert error.where is not None
    assert (error.where.line, error.where.path) == (7, "models[0].parameters.denstiy")
    assert "density" in error.next_step


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("merge_method: dare-ties\nmodels: [{model: o/a}]", "UNKNOWN_METHOD", "dare_ties"),
        ("merge_method: linaer\nmodels: [{model: o/a}]", "UNKNOWN_METHOD", "linear"),
        ("merge_metod: linear\nmodels: [{model: o/a}]", "UNKNOWN_KEY", "merge_method"),
        ("models: [{model: o/a}]", "MISSING_KEY", "merge_method"),
        ("merge_method: linear", "MISSING_KEY", "models"),
        ("merge_method: linear\nmodels: []", "RECIPE_INVALID", "model"),
        ("merge_method: linear\nmodels: [{model: o/a}]\nslices: [{sources: []}]", "RECIPE_INVALID", "Keep one"),
        ("merge_method: linear\nmodels: [{model: o/a, weight: 1}]", "UNKNOWN_KEY", "parameters"),
        ("merge_method: linear\nmodels: [{model: o/a}]\nweight: 1", "UNKNOWN_KEY", "parameters"),
        ("merge_method: linear\nmodels: [{model: o/a, layer_range: [0, 1]}]", "UNKNOWN_KEY", "slices"),
        ("merge_method: linear\ndtype: bf16\nmodels: [{model: o/a}]", "VALUE_OUT_OF_RANGE", "bfloat16"),
        ("merge_method: linear\ndtype: int64\nmodels: [{model: o/a}]", "VALUE_OUT_OF_RANGE", "float"),
        ("merge_method: ties\nmodels: [{model: o/a}]", "MISSING_KEY", "base_model"),
        ("merge_method: slerp\nbase_model: o/b\nmodels: [{model: o/a}, {model: o/c}]", "RECIPE_INVALID", "the list"),
        ("merge_method: linear\nmodels: [{model: o/a}, {model: o/a}]", "RECIPE_INVALID", "once"),
        ("merge_method: linear\nmodels: [{model: o/a, parameters: {weight: .nan}}]", "VALUE_OUT_OF_RANGE", "finite"),
        ("merge_method: linear\nmodels: [{model: o/a, parameters: {weight: much}}]", "RECIPE_INVALID", "a number"),
        ("merge_method: linear\nmodels: [{model: o/a+o/l+o/m}]", "RECIPE_INVALID", "Name one"),
        ("merge_method: linear\nmodels: [{model: o/a}]\n---\nname: x", "MISSING_KEY", "merge_method"),
        ("merge_method: linear\nmerge_method: ties\nmodels: [{model: o/a}]", "DUPLICATE_KEY", "Keep one"),
        ("just a sentence", "RECIPE_INVALID", "mapping"),
        ("", "RECIPE_INVALID", "merge_method"),
        ("a: [", "RECIPE_INVALID", "indentation"),
        ("merge_method: !!python/name:os.system linear", "RECIPE_INVALID", "Remove"),
        (
            "merge_method: ties\nbase_model: o/b\nmodels: [{model: o/a, parameters: {weight: 1, density: 1.5}}]",
            "VALUE_OUT_OF_RANGE", "[0, 1]",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]},"
            " {model: b, layer_range: [0, 3]}]}]",
            "RECIPE_INVALID", "same number",
        ),
        (
            "merge_method: ties\nbase_model: o/b\nslices: [{sources: [{model: o/a, layer_range: [0, 2]}]}]",
            "RECIPE_INVALID", "Add the base",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 2]}]}]",
            "VALUE_OUT_OF_RANGE", "[0, 8]",
        ),
    ],
)  # fmt: skip
def test_a_wrong_recipe_gets_its_own_code_and_a_hint(text: str, code: str, hint: str) -> None:
    error = refusal(text)
    assert error.code == code
    assert hint in error.next_step
    assert "Traceback" not in str(error)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "o/a/b", "https://h.co/o/a", "o/a--b", "o/.git", "x", "o/a b", "o/.."]
)
def test_a_stranger_can_name_repos_only(name: str) -> None:
    text = f"merge_method: linear\nmodels: [{{model: '{name}', parameters: {{weight: 1}}}}]"
    assert refusal(text, trust="stranger").code == "NOT_A_REPO_ID"


def test_parameters_of_other_methods_and_relics_are_accepted_with_a_notice() -> None:
    text = LINEAR + "parameters: {t: 0.5, int8_mask: true, embed_slerp: true, dtype: float16}\nname: x\n"
    codes = [notice.code for notice in recipe.parse(text).notices]
    assert codes == ["UNUSED_PARAMETER"] * 3 + ["MISPLACED_KEY", "UNUSED_KEY"]


def test_unknown_keys_become_notices_where_the_operator_says_so() -> None:
    parsed = recipe.parse(LINEAR + "colour: blue\n", unknown_keys="ignore")
    assert [notice.code for notice in parsed.notices] == ["UNKNOWN_KEY"]
    assert parsed.digest == recipe.parse(LINEAR).digest


def test_a_top_level_key_may_define_a_constant_for_use_elsewhere() -> None:
    text = "w: &W 0.5\nmerge_method: linear\nmodels: [{model: o/a, parameters: {weight: *W}}]"
    for trust in ("operator", "stranger"):
        parsed = recipe.parse(text, trust=trust)  # type: ignore[arg-type]
        assert parsed.modules[0].slices[0].sources[0].parameters["weight"] == 0.5
    assert refusal("w: &W 0.5\nmerge_method: linear\nmodels: [{model: o/a}]").code == "UNKNOWN_KEY"


def test_every_method_of_the_contract_is_known_to_the_parser() -> None:
    assert len(METHODS) == 20
    for method in METHODS.values():
        for parameter in (*method.per_input, *method.shared):
            assert isinstance(parameter.default, Absent) or parameter.admits(float(parameter.default))


WEIGHT = Parameter("weight", 7.0)


def test_the_nearest_level_wins_and_a_level_without_a_match_falls_through() -> None:
    own = {"weight": Conditions((Condition("mlp", 1.0), Condition("attn", Gradient((2.0, 4.0)))))}
    levels = [own, {"weight": Conditions(())}, {}, {"weight": 3.0}]
    assert resolve(WEIGHT, levels, "layers.0.mlp.up", 0.0) == 1.0
    assert resolve(WEIGHT, levels, "layers.0.attn.q", 0.5) == 3.0
    assert resolve(WEIGHT, levels, "norm", 0.5) == 3.0
    assert resolve(WEIGHT, levels[:3], "norm", 0.5) == 7.0


def test_a_gradient_is_evaluated_at_the_position_of_the_layer() -> None:
    assert [at((0.0, 0.5, 1.0), position(i, 5)) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert at((0.0, 1.0), position(0, 1)) == 1.0, "an only layer stands at the end"
    assert [at((True, False), u) for u in (0.0, 0.9, 1.0)] == [True, True, False]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_within_its_neighbours(values: list[Scalar], u: float) -> None:
    numbers = [float(v) for v in values]
    assert min(numbers) - 1e-9 <= float(at(values, u)) <= max(numbers) + 1e-9


keys = st.sampled_from(
    ["merge_method", "models", "slices", "base_model", "parameters", "dtype", "model", "weight", "filter", "value", "x"]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=True), st.text(max_size=8),
    st.sampled_from(["linear", "ties", "o/a", "o/b", "bfloat16"]),
)  # fmt: skip
trees = st.recursive(
    scalars, lambda child: st.lists(child, max_size=3) | st.dictionaries(keys, child, max_size=4), max_leaves=12
)


@settings(max_examples=60)
@given(trees)
def test_any_tree_is_a_recipe_or_is_refused_in_one_sentence(tree: object) -> None:
    text = yaml.safe_dump(tree)
    try:
        parsed = recipe.parse(text, trust="stranger")
    except Refused as error:
        assert "\n" not in error.message
        assert len(error.message) < 600
        assert not re.search(r"<[\w.]+ object at", error.message)
        return
    assert recipe.from_canonical(parsed.canonical()) == parsed


@given(st.text(max_size=300))
def test_any_text_is_a_recipe_or_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        recipe.parse(text, trust="stranger")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("denstiy", "density"), ("weights", "weight"), ("lamda", "lambda"), ("wieght", "weight"), ("scal", "scale"),
        ("Filter-Wise", "filter_wise"), ("select_top_k", "select_topk"), ("nuslerp_row", None), ("mask", None),
        ("gradient", None), ("x", None), ("ratio", None), ("alpha_beta", None), ("weight" * 1000, None),
    ],
)  # fmt: skip
def test_a_name_is_suggested_only_where_few_letters_differ(written: str, meant: str | None) -> None:
    """Names with half of their letters in common, such as nuslerp_row and filter_wise, are no typing errors."""
    assert closest(written, KNOWN_PARAMETERS) == meant


def test_a_folder_with_a_sign_of_references_in_its_name_is_written_as_a_mapping() -> None:
    """As mergekit reads it: `path` is the name as it is, and only text is split at `@` and `+`."""
    odd = "{model: {path: x@y+z, revision: null}, lora: {path: l@1, revision: main}}"
    for text in (
        f"merge_method: linear\nmodels: [{{model: {odd}}}, {{model: o/a}}]\nparameters: {{weight: 1}}",
        f"merge_method: slerp\nbase_model: {odd}\nmodels: [{{model: o/a}}]\nparameters: {{t: 1}}\n"
        f"tokenizer: {{source: {odd}, tokens: {{a: {{source: {odd}}}}}}}",
    ):
        parsed = recipe.parse(text)
        assert ModelRef("x@y+z", None, ModelRef("l@1", "main")) in parsed.sources
        assert recipe.from_canonical(parsed.canonical()) == parsed
        assert recipe.parse(recipe.write_yaml(parsed.document())) == parsed
    with pytest.raises(Refused, match="not the id of a repo"):
        recipe.parse(f"merge_method: linear\nmodels: [{{model: {odd}}}]", trust="stranger")
    assert recipe.parse("merge_method: passthrough\nmodels: [{model: x@y}]").sources == (ModelRef("x", "y"),)


@pytest.mark.parametrize("unknown_keys", ["refuse", "ignore"])
@pytest.mark.parametrize(
    ("text", "what", "instead"),
    [
        ("gate_mode: hidden\nexperts: [{source_model: o/a}]\nbase_model: o/a", "mergekit-moe", "Run `mergekit-moe"),
        ("genome: {models: [o/a], merge_method: ties}\ntasks: [{name: gsm8k}]", "mergekit-evolve", "merge_method"),
        ("stages: [{name: one, config_file: one.yml}]", "stages of a merge", "documents separated by `---`"),
        ("layer_slices: [{model: o/a, start: 0, end: 1}]", "bakllama", "mergebot bakllama CONFIG OUT"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "config of a model", "Write a recipe"),
    ],
)
def test_the_config_of_another_program_is_named_with_what_to_do(
    text: str, what: str, instead: str, unknown_keys: Any
) -> None:
    error = refusal(text, unknown_keys=unknown_keys)
    assert what in error.message and instead in error.next_step
