#!/usr/bin/env bash
# A cache made from the config does not show the recurrent state of RWKV and xLSTM.
# For most recurrent models of transformers 5.23.0 (Mamba, Jamba, Qwen3-Next, Zamba) DynamicCache(config=...) holds
# layers of linear attention, so one would guess that a config whose cache holds plain attention layers only belongs to
# a model without a recurrent state. For RWKV and xLSTM it also holds plain attention layers, though these models have
# no attention and keep their state elsewhere; only the flag `_is_stateful` of the model's class tells.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

print(f"transformers {transformers.__version__}")
seen = {}
for kind in ("mamba", "jamba", "rwkv", "xlstm"):
    config = AutoConfig.for_model(kind)
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    stateful = AutoModelForCausalLM._model_mapping[type(config)]._is_stateful
    seen[kind] = any("Linear" in layer for layer in layers), stateful
    print(f"{kind}: cache layers {sorted(layers)}, _is_stateful {stateful}")
expected = {"mamba": (True, True), "jamba": (True, True), "rwkv": (False, True), "xlstm": (False, True)}
assert seen == expected, "the behaviour has changed"
PYTHON
