#!/usr/bin/env bash
# One would guess: `save_pretrained` into a folder that holds a model replaces it, and `from_pretrained` loads the new
# one. It does when shards are replaced by a single file (the shards are removed). The other way round the old
# model.safetensors stays beside the new shards and their index, `from_pretrained` prefers the single file, and the old
# model is loaded without a word.
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import os
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__)
config = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
)
torch.manual_seed(0)
old = LlamaForCausalLM(config)
torch.manual_seed(1)
new = LlamaForCausalLM(config)
old.save_pretrained("model")
new.save_pretrained("model", max_shard_size="20KB")
print("files:", sorted(os.listdir("model")))
loaded = LlamaForCausalLM.from_pretrained("model").state_dict()


def same(model):
    return all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


print("loaded the model saved last:", same(new))
print("loaded the model saved first:", same(old))
sys.exit(0 if same(old) and not same(new) else 1)
PYTHON
