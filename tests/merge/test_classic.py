"""The two programs of 2023 run as they were called then. merging.md 4; the oracle is written in float64 from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import HIDDEN, INNER, VOCABULARY, llama_tensors, load, save
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import MergebotError, Refused
from bot.merge.checkpoints import checkpoint, lora
from bot.merge.execution import engine
from bot.merge.planning import planner
from bot.merge.planning.classic_tensors import plateaus
from bot.merge.recipe import classic
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.classic import Arguments

FLOAT32 = ("model.embed_tokens.weight", "lm_head.weight")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        folder = save(tmp_path / name, llama_tensors(seed, layers=4), dtype=torch.float16)
        (folder / "tokenizer_config.json").write_text(json.dumps({"of": name}))
    return tmp_path


def inputs(*names: str) -> list[Tensors]:
    return [{name: tensor.double() for name, tensor in load(Path(folder)).items()} for folder in names]


def run(*arguments: str) -> tuple[Tensors, dict[str, Any]]:
    """`mergebot classic out ...` through the real command; the tensors and the provenance."""
    result = CliRunner().invoke(app, ["--home", "home", "classic", "out", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load(Path("out")), json.loads(Path("out/merge_provenance.json").read_text())


def refused(*arguments: str) -> MergebotError:
    with pytest.raises(MergebotError) as caught:
        CliRunner().invoke(app, ["--home", "home", "classic", "out", *arguments], catch_exceptions=False)
    assert caught.value.next_step
    return caught.value


def agree(result: Tensors, truth: Tensors) -> None:
    """The names of the truth; embeddings and head in float32, the rest in bfloat16, each rounded once."""
    assert set(result) == set(truth)
    for name, wanted in truth.items():
        kind = torch.float32 if name in FLOAT32 else torch.bfloat16
        assert result[name].dtype == kind, name
        step = 1e-6 if kind == torch.float32 else 2**-8
        assert float((result[name].double() - wanted).abs().max()) <= step * float(wanted.abs().max()), name


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    keep = max(1, int(density * delta.numel())) if density > 0 else 0
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return delta * mask.reshape(delta.shape)


def ties(
    base: torch.Tensor, others: Sequence[torch.Tensor], weights: Sequence[float], densities: Sequence[float],
    *, normalize: bool = True, count: bool = False,
) -> torch.Tensor:  # fmt: skip
    votes = [w * trimmed(x - base, d) for x, w, d in zip(others, weights, densities, strict=True)]
    ballots = [vote.sign() for vote in votes] if count else votes
    elected = torch.where(sum(ballots) >= 0, 1.0, -1.0)  # type: ignore[arg-type]
    agreeing = [(vote.sign() == elected).double() for vote in votes]
    total = sum(m * vote for m, vote in zip(agreeing, votes, strict=True))
    divisor = sum(m * w for m, w in zip(agreeing, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    assert isinstance(divisor, torch.Tensor)
    return base + (total / torch.where(divisor == 0, 1.0, divisor) if normalize else total)


def slerp(t: float, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    cosine = float((a.flatten() @ c.flatten()) / (a.norm() * c.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * c
    angle = torch.tensor(cosine, dtype=torch.float64).arccos()
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * c) / torch.sin(angle)


GRADIENT = {  # over four layers: embeddings | layers | final norm
    "[0, 1]": [0, 0.2, 0.4, 0.6, 0.8, 1],
    "[0, 0.5, 1]": [0, 0.25, 0.5, 0.5, 0.75, 1],
}


def place(name: str, values: Sequence[float]) -> float:
    if name == "model.embed_tokens.weight":
        return values[0]
    return values[-1] if name == "model.norm.weight" else values[1 + int(name.split(".")[2])]


def test_ties_keeps_every_default_of_the_first_program(models: Path) -> None:
    result, _ = run("--merge", "a", "--merge", "b", "--base-model", "base")
    base, a, b = inputs("base", "a", "b")
    agree(result, {name: ties(base[name], [a[name], b[name]], [1, 1], [0.33, 0.33]) for name in base})
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "base"}


def test_ties_takes_weights_and_densities_by_position_and_a_listed_base_uses_one_up(models: Path) -> None:
    lists = [
        "--weight",
        "0.3",
        "--weight",
        "9",
        "--weight",
        "-0.6",
        "--density",
        "0.5",
        "--density",
        "0.1",
        "--density",
        "0.7",
    ]
    result, _ = run("--merge", "a", "--merge", "base", "--merge", "b", *lists, "--base-model", "base", "--no-normalize")
    base, a, b = inputs("base", "a", "b")
    agree(
        result,
        {n: ties(base[n], [a[n], b[n]], [0.3, -0.6], [0.5, 0.7], normalize=False) for n in base},
    )


def test_naive_count_elects_by_the_number_of_signs(models: Path) -> None:
    save(models / "c", llama_tensors(9, layers=4), dtype=torch.float16)
    named = ["--merge", "a", "--merge", "b", "--merge", "c", "--weight", "5", "--weight", "1", "--weight", "1"]
    result, _ = run(*named, "--base-model", "base", "--naive-count", "--density", "1")
    base, *others = inputs("base", "a", "b", "c")
    truth = {n: ties(base[n], [x[n] for x in others], [5, 1, 1], [1, 1, 1], count=True) for n in base}
    agree(result, truth)
    plain = {n: ties(base[n], [x[n] for x in others], [5, 1, 1], [1, 1, 1]) for n in base}
    assert any(not torch.allclose(truth[n], plain[n], rtol=0.1) for n in base)


def test_linear_divides_by_the_weights_unless_told_not_to(models: Path) -> None:
    a, b = inputs("a", "b")
    named = ["--merge", "a", "--merge", "b", "--weight", "0.3", "--weight", "0.9", "--method", "linear"]
    result, _ = run(*named)
    agree(result, {name: (0.3 * a[name] + 0.9 * b[name]) / 1.2 for name in a})
    (models / "out").rename(models / "first")
    result, _ = run(*named, "--no-normalize")
    agree(result, {name: 0.3 * a[name] + 0.9 * b[name] for name in a})


def test_an_unlisted_base_of_linear_gives_config_and_tokenizer_and_weighs_nothing(models: Path) -> None:
    result, _ = run("--merge", "a", "--merge", "b", "--weight", "2", "--method", "linear", "--base-model", "base")
    a, b = inputs("a", "b")
    agree(result, {name: (a[name] + b[name]) / 2 for name in a})
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "base"}


def test_slerp_goes_from_the_base_by_the_weight(models: Path) -> None:
    a, b = inputs("a", "b")
    result, _ = run("--merge", "a", "--merge", "b", "--method", "slerp", "--weight", "0.3")
    agree(result, {name: slerp(0.3, a[name], b[name]) for name in a})
    (models / "out").rename(models / "first")
    result, _ = run("--merge", "a", "--merge", "b", "--method", "slerp", "--weight", "0.3", "--base-model", "b")
    agree(result, {name: slerp(0.3, b[name], a[name]) for name in a})


@pytest.mark.parametrize("gradient", GRADIENT)
def test_a_gradient_of_slerp_runs_from_embeddings_to_norm_and_leaves_the_head_to_the_base(
    gradient: str, models: Path
) -> None:
    result, facts = run("--merge", "a", "--merge", "b", "--method", "slerp", "--layer-gradient", gradient)
    a, b = inputs("a", "b")
    values = GRADIENT[gradient]
    agree(result, {n: slerp(0.0 if "lm_head" in n else place(n, values), a[n], b[n]) for n in a})
    assert "CLASSIC_HEAD" in {notice["code"] for notice in facts["notices"]}


@pytest.mark.parametrize("gradient", GRADIENT)
def test_a_gradient_of_linear_is_the_weight_of_the_second_model(gradient: str, models: Path) -> None:
    result, _ = run("--merge", "a", "--merge", "b", "--method", "linear", "--layer-gradient", gradient)
    a, b = inputs("a", "b")
    truth = {}
    for name in a:
        g = GRADIENT[gradient][-1] if "lm_head" in name else place(name, GRADIENT[gradient])
        truth[name] = (1 - g) * a[name] + g * b[name]
    agree(result, truth)


def test_a_gradient_of_ties_weighs_the_task_vector_and_the_head_keeps_its_weight(models: Path) -> None:
    result, _ = run(
        "--merge", "a", "--base-model", "base", "--layer-gradient", "[0.2, 1]", "--no-normalize", "--weight", "0.7"
    )
    base, a = inputs("base", "a")
    values = [0.2 + 0.8 * i / 5 for i in range(6)]
    truth = {}
    for name in base:
        g = 0.7 if "lm_head" in name else place(name, values)
        truth[name] = ties(base[name], [a[name]], [g], [0.33], normalize=False)
    agree(result, truth)


def test_plateaus_stand_where_the_pieces_of_a_gradient_meet() -> None:
    assert plateaus([0, 0.5, 1], 5) == [0, 0.25, 0.5, 0.5, 0.75, 1, 1]
    assert plateaus([0, 0.5, 1], 4) == GRADIENT["[0, 0.5, 1]"]
    assert plateaus([0, 1], 4) == pytest.approx(GRADIENT["[0, 1]"])
    assert plateaus([0, 1, 2, 3], 1) == [0, 1, 2]
    with pytest.raises(Refused):
        plateaus([0, 1, 2, 3, 4], 1)


def test_the_config_beside_the_result_makes_the_same_result_again(models: Path) -> None:
    """The gradient is written out as conditions on names, which mergekit reads too."""
    first, _ = run("--merge", "a", "--merge", "b", "--method", "slerp", "--layer-gradient", "[0, 0.5, 1]")
    written = Path("out/mergekit_config.yml").read_text()
    Path("again.yml").write_text(written)
    result = CliRunner().invoke(app, ["--home", "home", "merge", "again.yml", "again"], catch_exceptions=False)
    assert result.exit_code == 0
    second = load(Path("again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_embeddings_are_cut_to_the_common_rows_and_the_config_counts_them(models: Path) -> None:
    big = llama_tensors(1, layers=4)
    for name in FLOAT32:
        big[name] = torch.cat([big[name], torch.ones(3, HIDDEN)])
    save(models / "a", big, dtype=torch.float16, vocab_size=VOCABULARY + 3)
    result, facts = run("--merge", "a", "--merge", "b", "--method", "linear", "--weight", "1")
    a, b = inputs("a", "b")
    for name in FLOAT32:
        a[name] = a[name][:VOCABULARY]
    agree(result, {name: (a[name] + b[name]) / 2 for name in b})
    assert "CLASSIC_CUT" in {notice["code"] for notice in facts["notices"]}
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == VOCABULARY


def test_under_ties_a_tensor_of_another_shape_keeps_the_base(models: Path) -> None:
    odd = llama_tensors(1, layers=4)
    odd["model.layers.2.mlp.up_proj.weight"] = torch.zeros(INNER + 1, HIDDEN)
    odd["lm_head.weight"] = odd["lm_head.weight"][: VOCABULARY - 2]  # too small to be cut to the base's
    save(models / "a", odd, dtype=torch.float16)
    result, _ = run("--merge", "a", "--base-model", "base")
    base, a = inputs("base", "a")
    kept = {"model.layers.2.mlp.up_proj.weight", "lm_head.weight"}
    agree(result, {n: base[n] if n in kept else ties(base[n], [a[n]], [1], [0.33]) for n in base})
    (models / "out").rename(models / "first")
    assert refused("--merge", "a", "--merge", "b", "--method", "linear", "--weight", "1").code == "SHAPE_MISMATCH"


def test_the_first_models_names_are_the_outputs_and_what_another_lacks_is_merged_from_the_rest(models: Path) -> None:
    first, other = llama_tensors(1, layers=4), llama_tensors(2, layers=4)
    lacking, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"
    del other[lacking]
    other[extra] = torch.ones(HIDDEN)
    del first["lm_head.weight"]
    save(models / "a", first, dtype=torch.float16)
    save(models / "b", other, dtype=torch.float16)
    result, facts = run("--merge", "a", "--merge", "b", "--method", "linear", "--weight", "1")
    a, b = inputs("a", "b")
    agree(result, {name: a[name] if name == lacking else (a[name] + b[name]) / 2 for name in a})
    assert {"CLASSIC_MISSING", "CLASSIC_LEFT_OUT"} <= {notice["code"] for notice in facts["notices"]}
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("position", [0, 1, 2])
def test_ties_copies_the_first_models_tensor_where_the_base_has_none(position: int, models: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    for seed, name in enumerate(("a", "b")):
        extra = {bias: torch.full((HIDDEN,), 1.5 + seed)}
        save(models / name, {**llama_tensors(seed + 1, layers=4), **extra}, dtype=torch.float16)
    named = ["a", "b"]
    named.insert(position, "base")
    result, provenance = run(*(part for name in named for part in ("--merge", name)), "--base-model", "base")
    # the first model's names are the output's: with the base in front there is no such tensor
    assert (bias in result) == (position > 0)
    if position:
        assert torch.equal(result[bias], torch.full((HIDDEN,), 1.5, dtype=torch.bfloat16))
        assert "CLASSIC_MISSING" in [notice["code"] for notice in provenance["notices"]]


def test_without_bf16_tensors_keep_their_type_and_without_copy_tokenizer_there_is_none(models: Path) -> None:
    result, _ = run(
        "--merge", "a", "--merge", "b", "--method", "linear", "--weight", "1", "--no-bf16", "--no-copy-tokenizer",
        "--int8-mask", "--cache-dir", "x", "--merged-cache-dir", "y",
    )  # fmt: skip
    assert {tensor.dtype for name, tensor in result.items() if name not in FLOAT32} == {torch.float16}
    assert {result[name].dtype for name in FLOAT32} == {torch.float32}
    assert not Path("out/tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--merge", "a"], "MISSING_KEY", "base"),
        (["--merge", "a", "--method", "linear"], "MISSING_KEY", "weight"),
        (["--merge", "a", "--merge", "b", "--method", "slerp"], "MISSING_KEY", "weight"),
        (["--merge", "a", "--method", "slerp", "--weight", "1"], "RECIPE_INVALID", "two models"),
        (
            ["--merge", "a", "--merge", "b", "--method", "slerp", "--weight", "1", "--weight", "1"],
            "RECIPE_INVALID", "one --weight",
        ),
        (
            ["--merge", "a", "--merge", "b", "--base-model", "base", "--layer-gradient", "[0, 1]"],
            "RECIPE_INVALID", "two models",
        ),
        (["--merge", "a", "--base-model", "base", "--density", "0.1", "--density", "1"], "RECIPE_INVALID", "--density"),
        (
            ["--merge", "a", "--merge", "base", "--base-model", "base", *["--weight", "1"] * 3],
            "RECIPE_INVALID", "--weight",
        ),
        (["--merge", "a", "--base-model", "base", "--density", "1.5"], "VALUE_OUT_OF_RANGE", "--density"),
        (["--merge", "a", "--base-model", "base", "--weight", "nan"], "VALUE_OUT_OF_RANGE", "--weight"),
        (["--merge", "a", "--base-model", "base", "--layer-gradient", "[1]"], "VALUE_OUT_OF_RANGE", "gradient"),
        (["--merge", "a", "--base-model", "base", "--layer-gradient", "[0, NaN]"], "VALUE_OUT_OF_RANGE", "gradient"),
        (["--merge", "a", "--base-model", "base", "--layer-gradient", "((("], "VALUE_OUT_OF_RANGE", "gradient"),
        (["--merge", "a", "--merge", "a", "--base-model", "base"], "RECIPE_INVALID", "twice"),
        (["--merge", "a@main", "--base-model", "base"], "NOT_A_REPO_ID", "a@main"),
        (["--merge", "a", "--base-model", "base", "--method", "dare"], "UNKNOWN_METHOD", "dare"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once(arguments: list[str], code: str, said: str, models: Path) -> None:
    error = refused(*arguments)
    assert error.code == code
    assert said in error.message
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        Arguments(merge=["o/a", "o/b+o/l"], base_model="o/base", density=[0.5], naive_count=True),
        Arguments(merge=["o/a", "o/b"], method="slerp", layer_gradient="[0, 0.5, 1]", bf16=False),
        Arguments(merge=["o/a", "o/b"], method="linear", weight=[1, 2], copy_tokenizer=False, normalize=False),
    ],
)
def test_a_classic_recipe_has_a_canonical_form_that_says_everything(arguments: Arguments) -> None:
    made = classic.recipe(arguments)
    again = recipe.from_canonical(made.canonical())
    assert again.canonical() == made.canonical()
    assert again.digest == made.digest
    assert again.classic == made.classic
    assert [str(ref) for ref in again.sources] == [str(ref) for ref in made.sources]
    others = Arguments(merge=["o/a", "o/b"], method="slerp", layer_gradient="[0, 1]")
    assert classic.recipe(others).digest != made.digest


def test_strangers_may_not_ask_for_the_lenient_manner() -> None:
    text = "merge_method: linear\nclassic: {naive_count: true}\nmodels: [{model: o/a, parameters: {weight: 1}}]\n"
    assert recipe.parse(text).classic is not None
    with pytest.raises(Refused) as caught:
        recipe.parse(text, trust="stranger")
    assert caught.value.code == "UNKNOWN_KEY"


# -- bakllama ----------------------------------------------------------------------------------------------------

STACK = """
layer_slices:
- {model: a, start: 0, end: 3}
- {model: b, start: 1, end: 4, scale: 0.5}
embedding_source: base
lm_head_source: a
"""


def stacked(text: str) -> Tensors:
    Path("config.yml").write_text(text)
    result = CliRunner().invoke(app, ["--home", "home", "bakllama", "config.yml", "out"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load(Path("out"))


def layers_of(tensors: Tensors, start: int, end: int, at: int, scale: float = 1.0) -> Tensors:
    out = {}
    for i in range(start, end):
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{i}."):
                factor = scale if "mlp.down_proj" in name else 1.0
                out[name.replace(f"layers.{i}.", f"layers.{at + i - start}.")] = (tensor.float() * factor).to(
                    tensor.dtype
                )
    return out


def test_bakllama_stacks_layers_scales_down_proj_and_takes_what_stands_around_from_the_named_models(
    models: Path,
) -> None:
    result = stacked(STACK)
    base, a, b = (load(models / name) for name in ("base", "a", "b"))
    truth = {**layers_of(a, 0, 3, 0), **layers_of(b, 1, 4, 3, 0.5)}
    truth["model.embed_tokens.weight"] = base["model.embed_tokens.weight"]
    truth |= {name: a[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert set(result) == set(truth)
    assert all(torch.equal(result[name], truth[name]) for name in truth)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 6
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "base"}
    assert "merge_method: passthrough" in Path("out/mergekit_config.yml").read_text()


def test_bakllama_takes_embeddings_from_the_first_slice_and_the_head_from_the_last_by_default(models: Path) -> None:
    result = stacked("layer_slices: [{model: a, start: 0, end: 1}, {model: b, start: 3, end: 4}]")
    a, b = load(models / "a"), load(models / "b")
    assert torch.equal(result["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(result["lm_head.weight"], b["lm_head.weight"])
    assert torch.equal(result["model.norm.weight"], b["model.norm.weight"])


@pytest.mark.parametrize(
    "source", ["lm_head_source: b", "embedding_source: a\nlm_head_source: b", "embedding_source: c"]
)
@pytest.mark.parametrize("others_tied", [True, False])
def test_bakllama_takes_the_head_from_a_tied_model_as_its_embedding(
    source: str, others_tied: bool, models: Path
) -> None:
    for seed, name in enumerate("abc"):
        save(models / name, llama_tensors(seed, layers=2, tied=name == "b" or others_tied))
    result = stacked("layer_slices: [{model: a, start: 0, end: 1}, {model: b, start: 1, end: 2}]\n" + source)
    first = load(models / ("c" if "c" in source.split(": ") else "a"))
    b = load(models / "b")
    assert torch.equal(result["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(result["lm_head.weight"], b["model.embed_tokens.weight"])
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_bakllama_recipe_has_a_canonical_form_that_comes_back(models: Path) -> None:
    made = classic.bakllama(STACK)
    assert recipe.from_canonical(made.canonical()).canonical() == made.canonical()
    folders = {ref: Path(ref.path) for ref in made.repos}
    opened = {ref: lora.open_source(checkpoint.LocalFiles(folder)) for ref, folder in folders.items()}
    assert engine.merge(planner.make(made, opened), folders, models / "direct").files


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("embedding_source: a", "MISSING_KEY", "layer_slices"),
        ("layer_slices: []", "RECIPE_INVALID", "empty"),
        ("layer_slices: [{model: a, start: 0}]", "MISSING_KEY", "end"),
        ("layer_slices: [{model: a, start: 2, end: 2}]", "VALUE_OUT_OF_RANGE", "layer_slices[0]"),
        ("layer_slices: [{model: a, start: 0, end: 9}]", "VALUE_OUT_OF_RANGE", "has 4 layers"),
        ("layer_slices: [{model: a, start: 0, end: 1, scael: 2}]", "UNKNOWN_KEY", "scael"),
        ("layer_slices: [{model: a, start: 0, end: 1}, {model: wide, start: 0, end: 1}]", "SHAPE_MISMATCH", "wide"),
    ],
)
def test_a_bakllama_config_that_cannot_work_is_refused(text: str, code: str, said: str, models: Path) -> None:
    save(models / "wide", llama_tensors(5, layers=4, hidden=10))
    Path("config.yml").write_text(text)
    with pytest.raises(MergebotError) as caught:
        CliRunner().invoke(app, ["--home", "home", "bakllama", "config.yml", "out"], catch_exceptions=False)
    assert caught.value.code == code
    assert said in caught.value.message
