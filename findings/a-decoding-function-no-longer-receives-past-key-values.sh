#!/usr/bin/env bash
# One would guess: a decoding function that is given to `generate` as `custom_generate` receives the cache as
# `past_key_values`, as it did in every release of transformers 5 before, and a minor release that renames a keyword
# keeps the old one for a while. `forward` does: it takes both names, with a warning. The decoding function does not:
# from 5.24.0 on it receives only `cache`, so one that looks for `past_key_values` finds no cache at all, and one that
# falls back to plain decoding without a cache becomes slow without a word.
# Seen with transformers 5.23.0 and 5.24.0, torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > shown.py <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.disable_progress_bar()
model = LlamaForCausalLM(
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
).eval()
received = []


def decoding(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
    received.extend(name for name in ("past_key_values", "cache") if kwargs.get(name) is not None)
    return input_ids


ids = torch.tensor([[3, 5, 7]])
model.generate(ids, custom_generate=decoding, max_new_tokens=2, do_sample=False)
cache = transformers.DynamicCache(config=model.config)
with torch.no_grad():
    model(input_ids=ids, past_key_values=cache, use_cache=True)
print("transformers", transformers.__version__, "hands over", received, "and forward filled", cache.get_seq_length())
PYTHON
for version in 5.23.0 5.24.0; do
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install -q torch==2.13.0 "transformers==$version"
  "$work/venv/bin/python" -W ignore shown.py 2>/dev/null | tee -a seen
done
printf '%s\n' "transformers 5.23.0 hands over ['past_key_values'] and forward filled 3" \
  "transformers 5.24.0 hands over ['cache'] and forward filled 3" > expected
diff expected seen
