#!/usr/bin/env bash
# One would guess: merge_and_unload of a LoRA adapter gives the model that the adapter computes, for layer_replication, too,
# which PEFT documents as made for passthrough merges. In fact the repeated layers share their weights, and the merge adds
# the change of every copy to that one weight: each copy gets the changes of all. The saved model computes something else,
# and nothing is said. Without replication the same merge is exact.
# Seen with peft 0.21.2, transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.disable_progress_bar()
print("peft", peft.__version__, "transformers", transformers.__version__)
ids = torch.arange(3, 30)[None]
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
off = {}
for name, repeated in (("no replication", None), ("replication", [[0, 2], [1, 2]])):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], layer_replication=repeated)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
        truth = adapted(input_ids=ids, use_cache=False).logits
        merged = adapted.merge_and_unload()(input_ids=ids, use_cache=False).logits
    off[name] = float((merged - truth).abs().max())
    print(f"{name}: merged logits are off by {off[name]:.2g}")
if off["no replication"] > 1e-3 or off["replication"] < 0.05:
    sys.exit("the merge of replicated layers has changed")
PYTHON
