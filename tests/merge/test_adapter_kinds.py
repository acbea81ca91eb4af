"""Every kind of adapter that PEFT 0.21.2 writes is applied, or refused with a next step that works."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import IDS, TEXT, adapt, agrees, build, logits, merged, peft, reopen, transformers
from tiny_checkpoints import merge, plan_of

from bot.errors import Refused
from bot.merge.checkpoints import adapter_config

lora_configs = pytest.importorskip("peft.tuners.lora.config")
LLAMA = "LlamaForCausalLM"
TARGETS = ["q_proj", "up_proj"]
APPLIED: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": lora_configs.VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": lora_configs.MontecloraConfig()},
    "rank pattern": {"rank_pattern": {r"layers\.[0-1]{1,2}\..*q_proj": 3}, "alpha_pattern": {"(?:up|down)_proj": 1}},
}


def gradients(model: Any, config: Any) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


def covariances(model: Any, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config, run_model=lambda: logits(model))


# kind -> options, what has to run before, whether PEFT itself can load and merge it
CHANGED_BASE: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "pissa": ({"init_lora_weights": "pissa"}, None, True),
    "olora": ({"init_lora_weights": "olora"}, None, True),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, None, False),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": lora_configs.LoraGAConfig()}, gradients, False),
    "corda": ({"init_lora_weights": "corda", "corda_config": lora_configs.CordaConfig()}, covariances, False),
}


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return build(tmp_path / "base", LLAMA, transformers.LlamaConfig(**TEXT))


def refused(folder: Path) -> Refused:
    with pytest.raises(Refused) as caught:
        plan_of("merge_method: passthrough\nmodels: [{model: base+adapter}]\n", folder)
    return caught.value


def reloaded(folder: Path) -> torch.Tensor:
    """Logits after PEFT itself loads and merges the adapter."""
    adapted = peft.PeftModel.from_pretrained(reopen(folder / "base", LLAMA), folder / "adapter")
    return logits(adapted.merge_and_unload().eval())


@pytest.mark.parametrize("kind", APPLIED)
def test_a_kind_whose_change_is_the_product_of_its_factors_is_applied(kind: str, base: Any, tmp_path: Path) -> None:
    truth = adapt(tmp_path / "adapter", base, {"target_modules": TARGETS, **APPLIED[kind]})
    agrees(logits(reopen(merged(tmp_path), LLAMA)), truth)


@pytest.mark.parametrize("kind", CHANGED_BASE)
def test_an_adapter_of_a_changed_base_is_sent_to_peft_only_where_peft_loads_it_right(
    kind: str, base: Any, tmp_path: Path
) -> None:
    options, before, loads = CHANGED_BASE[kind]
    truth = adapt(tmp_path / "adapter", base, {"target_modules": TARGETS, **options}, before=before)
    error = refused(tmp_path)
    assert error.code == "NOT_SUPPORTED"
    assert kind in error.message
    assert error.next_step.startswith("Merge it into its model with the PEFT library" if loads else "Ask for it as")
    try:
        off = float((reloaded(tmp_path) - truth).abs().max())
    except ValueError:
        off = float("inf")
    assert (off < 1e-4) is loads


def test_an_adapter_converted_to_plain_lora_as_the_next_step_says_is_applied(base: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa_niter_4")
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight) * 0.3)
    truth = logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    agrees(logits(reopen(merged(tmp_path), LLAMA)), truth)


def test_repeated_layers_are_made_by_slices_first_as_the_next_step_says(base: Any, tmp_path: Path) -> None:
    options = {"target_modules": TARGETS, "layer_replication": [[0, 2], [1, 2]]}
    truth = adapt(tmp_path / "adapter", base, options)
    error = refused(tmp_path)
    assert "repeats layers" in error.message
    assert float((reloaded(tmp_path) - truth).abs().max()) > 0.05  # PEFT's merge, which nobody is sent to
    slices = "".join(f"- sources: [{{model: base, layer_range: {part}}}]\n" for part in ("[0, 2]", "[1, 2]"))
    merge(f"merge_method: passthrough\nslices:\n{slices}", tmp_path, tmp_path / "longer")
    told = tmp_path / "adapter" / "adapter_config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "layer_replication": None}))
    agrees(logits(reopen(merged(tmp_path, "longer+adapter"), LLAMA)), truth)


@pytest.mark.parametrize(
    "options",
    [
        {"kasa_config": lora_configs.KasaConfig()},
        {"use_bdlora": lora_configs.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["up_proj"],
                                                 nblocks=2)},
    ],
    ids=["kasa", "bdlora"],
)  # fmt: skip
def test_a_kind_that_peft_merges_right_is_sent_there(options: dict[str, Any], base: Any, tmp_path: Path) -> None:
    truth = adapt(tmp_path / "adapter", base, {"target_modules": TARGETS, **options})
    assert refused(tmp_path).next_step.startswith("Merge it into its model with the PEFT library")
    agrees(reloaded(tmp_path), truth)


def test_a_kind_without_a_merged_model_is_not_sent_to_peft(base: Any, tmp_path: Path) -> None:
    options = {"target_modules": TARGETS, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    adapt(tmp_path / "adapter", base, options)
    assert refused(tmp_path).next_step.startswith("No merged model")
    with pytest.raises(NotImplementedError):
        reloaded(tmp_path)


def test_every_key_of_the_librarys_config_is_known() -> None:
    """A key that a later PEFT adds may change what the merged weight is: look at it, then list it here or there."""
    plain = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size",
        "runtime_config", "lora_bias", "ensure_weight_tying",
    }  # fmt: skip
    known = plain | set(adapter_config._KEYS) | set(adapter_config._TRAINING_ONLY)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


def test_types_of_adapters_without_a_merge_are_those_of_the_library() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    without = {kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
               if not hasattr(tuner, "merge_and_unload")}  # fmt: skip
    assert without <= set(adapter_config._WITHOUT_MERGE)
    assert set(adapter_config._WITHOUT_MERGE) - without == {"LILY", "POLY", "SHADOW", "XLORA"}  # theirs raises
