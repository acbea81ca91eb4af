#!/usr/bin/env bash
# One would guess: transformers 5 no longer reads generation settings from config.json ("this strategy is not supported
# anymore" says its error for a changed config). It does where the folder has no generation_config.json: greedy answers
# then obey `repetition_penalty` and `num_beams` of config.json. With a generation_config.json beside it, even one that
# holds nothing but token ids, the same settings are dropped without a word. So copying or losing that file changes the
# answers of equal weights.
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, eos_token_id=31, bos_token_id=30,
)
model = LlamaForCausalLM(config)
with torch.no_grad():  # every token is followed by token 5
    model.lm_head.weight.zero_()
    model.lm_head.weight[5] = 1.0
    model.model.norm.weight.fill_(1.0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.fill_(1.0)
    model.lm_head.weight[6] = 0.9
model.save_pretrained("model")
file = Path("model/config.json")
file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 5.0}))


def answer() -> list[int]:
    loaded = AutoModelForCausalLM.from_pretrained("model")
    return loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False)[0, 2:].tolist()


beside = answer()
print("with generation_config.json:", beside)
Path("model/generation_config.json").unlink()
alone = answer()
print("without it:", alone)
sys.exit(0 if beside == [5, 5, 5, 5] and alone[:2] == [5, 6] else 1)
PYTHON
