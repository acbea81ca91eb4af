"""A model seen through a LoRA adapter is the model merged with it, without that merge ever lying anywhere.

The reference is written from the papers in float64: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA
arXiv:2402.09353. Where the PEFT library is at hand, it agrees too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import HIDDEN, INNER, VOCABULARY, llama_tensors, load, merge, plan_of, save

from bot.errors import Failed, Refused
from bot.merge.checkpoints import checkpoint, lora, patches
from bot.merge.checkpoints.lora import Adapter
from bot.merge.execution.lora_rows import PatchedView, stored_tensor
from bot.merge.execution.views import StoredView
from bot.merge.planning.byte_ranges import needed
from bot.merge.recipe.spec import ModelRef

PREFIX = "base_model.model."
ALONE = "merge_method: passthrough\nmodels: [{{model: {}}}]\n"


def adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter; tensor names without the prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / lora.WEIGHTS)
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "someone/base", **config}
    (folder / lora.CONFIG).write_text(json.dumps(told))
    return folder


def factors(module: str, out: int, width: int, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, width, generator=draw), torch.randn(out, rank, generator=draw)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"


Q, DOWN, UP = layer(0, "self_attn.q_proj"), layer(1, "mlp.down_proj"), layer(1, "mlp.up_proj")
SIDES = {Q: (HIDDEN, HIDDEN), DOWN: (HIDDEN, INNER), UP: (INNER, HIDDEN)}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "other")):
        save(tmp_path / name, llama_tensors(seed))
    return tmp_path


def through(models: Path, name: str = "base+adapter") -> dict[str, torch.Tensor]:
    merge(ALONE.format(name), models, models / "out")
    return load(models / "out")


def agree(result: torch.Tensor, truth: torch.Tensor) -> None:
    assert result.shape == truth.shape
    assert float((result.double() - truth.double()).abs().max()) <= 1e-6 * float(truth.abs().max())


def only_differs(result: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], names: set[str]) -> None:
    assert {name for name in base if not torch.equal(result[name], base[name])} == names


@pytest.mark.parametrize("stabilised", [False, True])
def test_every_weight_gets_its_scaled_product_and_no_other_changes(models: Path, stabilised: bool) -> None:
    tensors = {k: v for i, (m, sides) in enumerate(SIDES.items()) for k, v in factors(m, *sides, seed=i).items()}
    adapter(models / "adapter", tensors, use_rslora=stabilised)
    result, base = through(models), llama_tensors(0)
    for module in SIDES:
        scale = 3 / (math.sqrt(2) if stabilised else 2)
        b, a = tensors[f"{module}.lora_B.weight"].double(), tensors[f"{module}.lora_A.weight"].double()
        agree(result[f"{module}.weight"], base[f"{module}.weight"].double() + scale * (b @ a))
    only_differs(result, base, {f"{module}.weight" for module in SIDES})


def test_patterns_give_single_modules_their_own_rank_and_alpha(models: Path) -> None:
    tensors = {**factors(Q, HIDDEN, HIDDEN, 3), **factors(DOWN, HIDDEN, INNER, 1), **factors(UP, INNER, HIDDEN, 2)}
    adapter(
        models / "adapter", tensors, rank_pattern={"q_proj": 3, r".*\.1\.mlp\.down_proj": 1},
        alpha_pattern={"^" + UP: 5, "q_proj": 7, "(q|k)_proj": 11},
    )  # fmt: skip
    result, base = through(models), llama_tensors(0)
    for module, scale in {Q: 7 / 3, DOWN: 3 / 1, UP: 5 / 2}.items():
        product = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        agree(result[f"{module}.weight"], base[f"{module}.weight"].double() + scale * product)


def test_dora_scales_every_output_to_its_magnitude(models: Path) -> None:
    tensors = factors(DOWN, HIDDEN, INNER)
    tensors[f"{DOWN}.lora_magnitude_vector"] = torch.rand(HIDDEN) + 0.5
    adapter(models / "adapter", tensors, use_dora=True)
    result, base = through(models), llama_tensors(0)
    product = tensors[f"{DOWN}.lora_B.weight"].double() @ tensors[f"{DOWN}.lora_A.weight"].double()
    direction = base[f"{DOWN}.weight"].double() + 1.5 * product
    magnitude = tensors[f"{DOWN}.lora_magnitude_vector"].double()
    agree(result[f"{DOWN}.weight"], magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_get_the_transposed_product(models: Path, dora: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    name = "model.embed_tokens"
    a, b = torch.randn(2, VOCABULARY, generator=draw), torch.randn(HIDDEN, 2, generator=draw)
    tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    magnitude = torch.rand(HIDDEN, generator=draw) + 0.5
    if dora:
        tensors[f"{name}.lora_magnitude_vector"] = magnitude
    adapter(models / "adapter", tensors, use_dora=dora)
    result, base = through(models), llama_tensors(0)
    truth = base[f"{name}.weight"].double() + 1.5 * (b.double() @ a.double()).T
    if dora:
        truth = magnitude.double() * truth / truth.norm(dim=0, keepdim=True)
    agree(result[f"{name}.weight"], truth)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_matrices_stored_with_inputs_first_are_patched_transposed_whatever_the_config_says(
    tmp_path: Path, flag: bool, dora: bool
) -> None:
    """GPT-2: its Conv1D keeps (in, out); the adapter's names carry a prefix that its checkpoints lack."""
    draw = torch.Generator().manual_seed(5)
    base = {"wte.weight": torch.randn(VOCABULARY, HIDDEN, generator=draw), "ln_f.weight": torch.ones(HIDDEN)}
    for i in range(2):
        base[f"h.{i}.attn.c_attn.weight"] = torch.randn(HIDDEN, 3 * HIDDEN, generator=draw)
        base[f"h.{i}.attn.c_proj.weight"] = torch.randn(HIDDEN, HIDDEN, generator=draw)
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "gpt2", "n_layer": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    wide, square = "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"
    tensors = {**factors(wide, 3 * HIDDEN, HIDDEN, seed=1), **factors(square, HIDDEN, HIDDEN, seed=2)}
    for module, size in ((wide, 3 * HIDDEN), (square, HIDDEN)):
        if dora:
            tensors[f"{module}.lora_magnitude_vector"] = torch.rand(size, generator=draw) + 0.5
    adapter(tmp_path / "adapter", tensors, fan_in_fan_out=flag, use_dora=dora)
    result = through(tmp_path)
    for module in (wide, square):
        own = module.removeprefix("transformer.") + ".weight"
        product = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        truth = base[own].double() + 1.5 * product.T
        if dora:
            truth = tensors[f"{module}.lora_magnitude_vector"].double() * truth / truth.norm(dim=0, keepdim=True)
        agree(result[own], truth)


def test_saved_modules_and_biases_replace_the_models_own(models: Path) -> None:
    base = llama_tensors(0)
    base[f"{Q}.bias"] = torch.zeros(HIDDEN)
    base[f"{UP}.bias"] = torch.zeros(INNER)
    save(models / "base", base)
    tensors = {
        **factors(Q, HIDDEN, HIDDEN),
        f"{Q}.base_layer.bias": torch.full((HIDDEN,), 2.0),
        f"{UP}.bias": torch.full((INNER,), 3.0),
        "lm_head.weight": torch.full((VOCABULARY, HIDDEN), 4.0),
        "model.norm.modules_to_save.default.weight": torch.full((HIDDEN,), 5.0),
    }
    adapter(models / "adapter", tensors, bias="all", modules_to_save=["lm_head", "norm"])
    result = through(models)
    saved = {f"{Q}.bias": 2.0, f"{UP}.bias": 3.0, "lm_head.weight": 4.0, "model.norm.weight": 5.0}
    for name, value in saved.items():
        assert bool((result[name] == value).all())
    only_differs(result, base, {*saved, f"{Q}.weight"})


def test_a_saved_head_unties_a_model_that_shares_its_embedding(models: Path) -> None:
    save(models / "base", llama_tensors(0, tied=True))
    adapter(models / "adapter", {"lm_head.weight": torch.ones(VOCABULARY, HIDDEN)}, modules_to_save=["lm_head"])
    planned, _ = plan_of(ALONE.format("base+adapter"), models)
    assert json.loads(planned.config)["tie_word_embeddings"] is False
    assert any("unties lm_head.weight" in notice.text for notice in planned.notices)
    assert bool((through(models)["lm_head.weight"] == 1).all())


def test_an_adapted_head_of_a_tied_model_changes_the_head_only(models: Path) -> None:
    base = llama_tensors(0, tied=True)
    save(models / "base", base)
    tensors = factors("lm_head", VOCABULARY, HIDDEN)
    adapter(models / "adapter", tensors)
    result = through(models)
    product = tensors["lm_head.lora_B.weight"].double() @ tensors["lm_head.lora_A.weight"].double()
    agree(result["lm_head.weight"], base["model.embed_tokens.weight"].double() + 1.5 * product)
    only_differs(result, base, set())


def test_a_base_and_the_same_base_with_its_adapter_are_two_models(models: Path) -> None:
    tensors = factors(Q, HIDDEN, HIDDEN)
    adapter(models / "adapter", tensors)
    text = """
merge_method: linear
models:
- {model: base, parameters: {weight: 1}}
- {model: base+adapter, parameters: {weight: 3}}
- {model: other+adapter, parameters: {weight: 4}}
"""
    merge(text, models, models / "out")
    base, other = llama_tensors(0), llama_tensors(1)
    product = 1.5 * tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double()
    name = f"{Q}.weight"
    agree(load(models / "out")[name], (4 * base[name].double() + 4 * other[name].double() + 7 * product) / 8)
    planned, folders = plan_of(text, models)
    assert set(folders) == {ModelRef("base"), ModelRef("other"), ModelRef("adapter")}
    assert [source.roles for source in planned.sources if source.model == ModelRef("adapter")] == [("adapter",)]
    assert lora.WEIGHTS in needed(planned)[ModelRef("adapter")]


def test_random_masks_belong_to_the_source_as_written(models: Path) -> None:
    adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN))
    text = "merge_method: dare_linear\nbase_model: base\nparameters: {weight: 1, density: 0.5}\nmodels: [{model: %s}]\n"
    keys = [plan_of(text % name, models)[0].steps[0].work.keys[0] for name in ("other", "other+adapter")]
    assert keys[0] != keys[1]


def test_an_adapter_of_half_floats_on_a_model_of_half_floats_is_rounded_once(models: Path) -> None:
    base = llama_tensors(0)
    save(models / "base", base, dtype=torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in factors(Q, HIDDEN, HIDDEN).items()}
    adapter(models / "adapter", tensors)
    product = tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double()
    truth = (base[f"{Q}.weight"].bfloat16().double() + 1.5 * product).bfloat16()
    assert torch.equal(through(models)[f"{Q}.weight"], truth)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_patched_view_reads_the_same_in_any_pieces(tmp_path: Path, turned: bool, dora: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    out, width, rank = 30, 20, 3
    stored = {
        "w": torch.randn(*((width, out) if turned else (out, width)), generator=draw),
        "a": torch.randn(rank, width, generator=draw),
        "b": torch.randn(out, rank, generator=draw),
        "m": torch.rand(out, generator=draw),
    }
    save_file(stored, tmp_path / "x.safetensors")
    files = checkpoint.LocalFiles(tmp_path)
    found, _ = checkpoint.read_header(files, "x.safetensors", files.sizes()["x.safetensors"], "x", checkpoint.TRUSTED)
    patch = patches.LowRank(ModelRef("l"), found["a"], found["b"], 0.7, turned, found["m"] if dora else None)

    def view(wide: torch.dtype) -> PatchedView:
        return PatchedView(StoredView(files, found["w"], wide), patch, lambda t: stored_tensor(files, t, wide))

    product = stored["b"].double() @ stored["a"].double()
    truth = stored["w"].double() + 0.7 * (product.T if turned else product)
    if dora:
        magnitude, along = stored["m"].double(), 0 if turned else 1
        truth = truth / truth.norm(dim=along, keepdim=True) * (magnitude[None, :] if turned else magnitude[:, None])
    for wide, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        seen = view(wide)
        assert seen.unit == truth.shape[1]
        for size in (seen.unit, 4 * seen.unit, truth.numel(), 7):
            starts = range(0, truth.numel(), size)
            pieces = [seen.read(start, min(truth.numel(), start + size)).clone() for start in starts]
            assert float((torch.cat(pieces).double() - truth.reshape(-1)).abs().max()) <= tolerance * 10


def test_the_base_it_was_trained_on_is_noted_when_it_is_another(models: Path) -> None:
    adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN))
    texts = [notice.text for notice in plan_of(ALONE.format("other+adapter"), models)[0].notices]
    assert any("'someone/base'" in text and "fit other" in text for text in texts)
    texts = [notice.text for notice in plan_of(ALONE.format("base+adapter"), models)[0].notices]
    assert not any("was trained on" in text for text in texts)


def refused(models: Path, name: str = "base+adapter") -> Refused:
    with pytest.raises(Refused) as caught:
        plan_of(ALONE.format(name), models)
    assert caught.value.next_step
    return caught.value


STRAY = layer(7, "self_attn.q_proj")


@pytest.mark.parametrize(
    ("tensors", "config", "code", "said"),
    [
        (factors(STRAY, HIDDEN, HIDDEN), {}, "TENSOR_MISSING", f"{STRAY}.lora_A.weight"),
        ({"score.weight": torch.ones(2, HIDDEN)}, {}, "TENSOR_MISSING", "score.weight"),
        (factors(Q, HIDDEN + 1, HIDDEN), {}, "SHAPE_MISMATCH", f"{Q}.weight"),
        ({"model.norm.weight": torch.ones(3)}, {}, "SHAPE_MISMATCH", "a saved tensor [3]"),
        (factors(Q, HIDDEN, HIDDEN, 3), {}, "BAD_CHECKPOINT", "rank 2"),
        ({f"{Q}.lora_A.weight": torch.ones(2, HIDDEN)}, {}, "BAD_CHECKPOINT", "lacks lora_B"),
        ({**factors(Q, 8, 8), f"{Q}.lora_B.bias": torch.ones(8)}, {}, "TENSOR_MISSING", "lora_B.bias"),
        (factors(Q, HIDDEN, HIDDEN), {"use_dora": True}, "BAD_CHECKPOINT", "magnitudes"),
        (factors(Q, 8, 8, 40), {"r": 40}, "SHAPE_MISMATCH", "[40, 8]"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8).int()}, {}, "BAD_CHECKPOINT", "int32"),
        (factors(Q, 8, 8), {"r": 0}, "BAD_CHECKPOINT", "`r`"),
        (factors(Q, 8, 8), {"r": 10**9}, "BAD_CHECKPOINT", "`r`"),
        (factors(Q, 8, 8), {"r": True}, "BAD_CHECKPOINT", "`r`"),
        (factors(Q, 8, 8), {"lora_alpha": math.nan}, "BAD_CHECKPOINT", "`lora_alpha`"),
        (factors(Q, 8, 8), {"lora_alpha": 10**400}, "BAD_CHECKPOINT", "`lora_alpha`"),
        (factors(Q, 8, 8), {"lora_alpha": "16"}, "BAD_CHECKPOINT", "`lora_alpha`"),
        (factors(Q, 8, 8), {"use_dora": "yes"}, "BAD_CHECKPOINT", "`use_dora`"),
        (factors(Q, 8, 8), {"rank_pattern": {"(?=q)": 3}}, "BAD_CHECKPOINT", "`rank_pattern`"),
        (factors(Q, 8, 8), {"rank_pattern": {"q": 0}}, "BAD_CHECKPOINT", "`rank_pattern`"),
        (factors(Q, 8, 8), {"alpha_pattern": {"x" * 3000: 3}}, "BAD_CHECKPOINT", "`alpha_pattern`"),
        (factors(Q, 8, 8), {"alpha_pattern": [1]}, "BAD_CHECKPOINT", "`alpha_pattern`"),
        (factors(Q, 8, 8), {"peft_type": "IA3"}, "NOT_SUPPORTED", "IA3"),
        (factors(Q, 8, 8), {"peft_type": "PROMPT_TUNING"}, "NOT_SUPPORTED", "PROMPT_TUNING"),
        (factors(Q, 8, 8), {"peft_type": None}, "NOT_SUPPORTED", "unnamed kind"),
        (factors(Q, 8, 8), {"layer_replication": [[0, 2], [1, 2]]}, "NOT_SUPPORTED", "repeats layers"),
        (factors(Q, 8, 8), {"init_lora_weights": "pissa_niter_16"}, "NOT_SUPPORTED", "pissa"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_or_means_something_else_is_refused_by_name(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], code: str, said: str, models: Path
) -> None:
    adapter(models / "adapter", tensors, **config)
    error = refused(models)
    assert error.code == code
    assert said in error.message
    assert "adapter" in error.message


def test_a_pattern_made_to_run_for_ever_is_read_in_no_time(models: Path) -> None:
    hostile = {"(a*)*b": 5, "((a|aa)+)+c": 5, "(.*)(.*)(.*)(.*)(.*)x": 5}
    adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN), alpha_pattern=hostile)
    planned, _ = plan_of(ALONE.format("base+adapter"), models)
    patched = [operand.patch for step in planned.steps for operand in step.work.operands if operand.patch is not None]
    assert [patch.scale for patch in patched] == [1.5]


def test_a_tensor_given_twice_under_two_spellings_is_refused(models: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(8), "model.norm.modules_to_save.weight": torch.zeros(8)}
    adapter(models / "adapter", tensors)
    assert "twice" in refused(models).message
    tensors = factors(Q, HIDDEN, HIDDEN)
    tensors[f"{Q}.lora_A.default.weight"] = torch.ones(2, HIDDEN)
    adapter(models / "adapter", tensors)
    assert "twice" in refused(models).message


def test_thousands_of_stray_names_are_refused_as_quickly_as_one(models: Path) -> None:
    adapter(models / "adapter", {f"stray{i}.x.weight": torch.ones(1) for i in range(20_000)})
    started = time.process_time()
    assert refused(models).code == "TENSOR_MISSING"
    assert time.process_time() - started < 3


def test_a_nan_in_an_adapter_counts_as_one_of_the_source_as_written(models: Path) -> None:
    tensors = factors(Q, HIDDEN, HIDDEN)
    tensors[f"{Q}.lora_B.weight"][3, 0] = math.nan
    adapter(models / "adapter", tensors)
    merged = merge(ALONE.format("base+adapter"), models, models / "out")
    assert next(n.text for n in merged.notices if n.code == "NOT_FINITE").startswith("base+adapter")
    with pytest.raises(Failed) as caught:
        merge(ALONE.format("base+adapter"), models, models / "again", on_nonfinite="fail")
    assert caught.value.code == "NOT_FINITE"
    assert f"{Q}.weight" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rslora", "patterns", "dora", "embedding", "saved", "bias", "gpt2"])
def test_the_peft_library_merges_the_same(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, attention_bias=True, **size)
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    options: dict[str, dict[str, Any]] = {
        "rslora": {"target_modules": "all-linear", "use_rslora": True},
        "patterns": {
            "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.up_proj": 6},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1},
        },
        "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        "bias": {"target_modules": ["q_proj"], "bias": "all"},
        "gpt2": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    }  # fmt: skip
    torch.manual_seed(0)
    build = transformers.GPT2LMHeadModel if kind == "gpt2" else transformers.LlamaForCausalLM
    model = build(gpt2 if kind == "gpt2" else llama)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, **options[kind]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = adapted.merge_and_unload().state_dict()
    ours, before = through(tmp_path), load(tmp_path / "base")
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    for name, tensor in ours.items():
        agree(tensor, theirs[name if name in theirs else f"transformer.{name}"])


def test_pickled_adapters_and_names_of_no_adapter_are_refused(models: Path) -> None:
    folder = adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN))
    (folder / lora.WEIGHTS).rename(folder / "adapter_model.bin")
    assert refused(models).code == "SOURCE_NOT_SAFETENSORS"
    assert "adapter_model.bin" in refused(models).message
    save_file({"model.q_proj.lora_A.weight": torch.ones(2, 8)}, folder / lora.WEIGHTS)
    assert "base_model.model." in refused(models).message


def test_a_model_in_the_adapters_place_and_an_adapter_in_a_models_are_refused_with_the_way_out(models: Path) -> None:
    adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN))
    assert refused(models, "base+other").code == "NOT_SUPPORTED"
    error = refused(models, "adapter")
    assert error.code == "NOT_SUPPORTED"
    assert "someone/base+adapter" in error.next_step


def test_opening_an_adapter_reads_no_weight_and_says_what_it_is(models: Path) -> None:
    adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN))
    opened = lora.open_source(checkpoint.LocalFiles(models / "adapter"), limits=checkpoint.UNTRUSTED)
    assert isinstance(opened, Adapter)
    assert opened.config.scale_of("anything") == 1.5
    assert isinstance(lora.open_source(checkpoint.LocalFiles(models / "base")), checkpoint.Checkpoint)


def test_another_alpha_makes_another_plan(models: Path) -> None:
    digests = set()
    for alpha in (3, 4):
        adapter(models / "adapter", factors(Q, HIDDEN, HIDDEN), lora_alpha=alpha)
        digests.add(plan_of(ALONE.format("base+adapter"), models)[0].digest)
    assert len(digests) == 2
