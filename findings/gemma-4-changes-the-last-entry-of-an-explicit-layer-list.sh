#!/usr/bin/env bash
# Gemma 4 does not take its explicit list of layer kinds as it stands.
# One would guess that `layer_types` in a config decides the attention of every layer, so that a model whose last layers
# are cut off (or whose layers are stacked anew) is described by the list cut in the same way; for Gemma 3 this is so.
# In transformers 5.23.0 the config of Gemma 4 turns the last entry into full attention, and with it the head size of
# that layer: a cut model that ends with a layer of sliding attention cannot be described at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import transformers
from transformers import Gemma3TextConfig, Gemma4TextConfig

print(f"transformers {transformers.__version__}")
given = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
read = {}
for kind in (Gemma3TextConfig, Gemma4TextConfig):
    config = kind(num_hidden_layers=4, layer_types=list(given))
    read[kind.model_type] = config.layer_types
    print(f"{kind.model_type}: {config.layer_types}")
sizes = [config.per_layer_config[i].head_dim for i in range(4)]
print(f"head sizes of gemma4_text: {sizes}")
assert read["gemma3_text"] == given, "the behaviour has changed"
assert read["gemma4_text"] == [*given[:3], "full_attention"], "the behaviour has changed"
assert sizes == [512, 256, 512, 512], "the behaviour has changed"
PYTHON
