#!/usr/bin/env bash
# One would guess: PeftModel.from_pretrained gives the model whose adapter save_pretrained wrote, or an error. That holds for
# LoRA, PiSSA and OLoRA: the change that their start made to the base follows from the weights, and loading repeats it. In
# fact PiSSA by fast SVD (`pissa_niter_N`, the variant advised for large models) repeats it with other random numbers, and
# LoRA-GA cannot repeat it without gradients and leaves it out: both load without a word, as other models. Only adapters
# saved with path_initial_model_for_weight_conversion are the trained ones.
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
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.disable_progress_bar()
print("peft", peft.__version__, "transformers", transformers.__version__)
ids = torch.arange(3, 30)[None]
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).save_pretrained("base")


def base():
    return LlamaForCausalLM.from_pretrained("base").eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


wrong = []
for start in (True, "pissa", "olora", "pissa_niter_4", "lora_ga"):
    model = base()
    more = {"lora_ga_config": LoraGAConfig()} if start == "lora_ga" else {}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start, **more)
    if start == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    truth = logits(adapted)
    adapted.save_pretrained(f"adapter_{start}")
    off = float((logits(peft.PeftModel.from_pretrained(base(), f"adapter_{start}")) - truth).abs().max())
    print(f"init_lora_weights={start}: reloaded, the logits are off by {off:.2g}")
    wrong += [start] if off > 0.01 else []
if wrong != ["pissa_niter_4", "lora_ga"]:
    sys.exit(f"other adapters reload as another model now: {wrong}")
PYTHON
