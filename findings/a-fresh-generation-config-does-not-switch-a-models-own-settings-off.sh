#!/usr/bin/env bash
# A generation config given to `generate` does not replace the model's own: what it leaves open is taken from there.
# One would guess that generate(generation_config=GenerationConfig(do_sample=False)) is plain greedy search. In
# transformers 5.23.0 every field that is None is filled in from model.generation_config, so the model's
# repetition_penalty is applied all the same. Only a value that is written out (1.0) switches it off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None)
model = GPT2LMHeadModel(config).eval()
prompt = torch.tensor([[1, 2, 3]])


def greedy(**settings: float) -> list[int]:
    asked = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0, **settings)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=asked)[0].tolist()


plain = greedy()
model.generation_config.repetition_penalty = 2.0
fresh, written_out = greedy(), greedy(repetition_penalty=1.0)
print(f"transformers {transformers.__version__}")
print(f"without a setting of the model's own: {plain}")
print(f"its own repetition_penalty is 2.0, a fresh config is given: {fresh}")
print(f"the given config writes 1.0 out: {written_out}")
assert fresh != plain and written_out == plain, "the behaviour has changed"
PYTHON
