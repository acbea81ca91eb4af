#!/usr/bin/env bash
# One would guess: `save_pretrained` of transformers 5 writes a Mixtral in the published layout, one tensor for each
# matrix of each expert, as it does for a new model. That depends on the file the model came from: loaded from one with
# fused experts (a stored state_dict, an output of mergekit-moe 0.1.5) it is saved fused again. transformers 4.57 finds
# none of its experts in such a file, and a round trip through transformers 5 does not help. Copied into a model made by
# `from_config`, the same weights are saved as published.
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import transformers
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__)
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4,
)


def experts(folder: str) -> int:
    return sum("experts" in name for name in load_file(f"{folder}/model.safetensors"))


new = MixtralForCausalLM(config)
new.save_pretrained("new")
config.save_pretrained("fused")
fused = {name: tensor.clone() for name, tensor in new.state_dict().items()}
save_file(fused, "fused/model.safetensors", metadata={"format": "pt"})
loaded, report = MixtralForCausalLM.from_pretrained("fused", output_loading_info=True)
loaded.save_pretrained("saved again")
copied = MixtralForCausalLM(config)
copied.load_state_dict(loaded.state_dict())
copied.save_pretrained("copied")
counts = {folder: experts(folder) for folder in ("new", "fused", "saved again", "copied")}
print("tensors of experts:", counts, "missing when loaded:", len(report["missing_keys"]))
right = {"new": 12, "fused": 2, "saved again": 2, "copied": 12}
sys.exit(0 if counts == right and not report["missing_keys"] else 1)
PYTHON
