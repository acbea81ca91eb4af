#!/usr/bin/env bash
# One would guess: `tie_word_embeddings: false` of Flan-T5 and T5 v1.1 says that the head is not the embedding, and a
# model loaded and saved again keeps saying so. In fact T5Config reads the flag as "do not scale the decoder's outputs",
# then sets it to true for every T5; the head stays apart only because it is stored and differs. So the saved config says
# tied over a head of its own: a reader that trusts the flag drops that head, and computes something else.
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

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__)
torch.manual_seed(0)
config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
T5ForConditionalGeneration(config).save_pretrained("flan")
tensors = load_file("flan/model.safetensors")
save_file({**tensors, "lm_head.weight": torch.randn(64, 32)}, "flan/model.safetensors", metadata={"format": "pt"})
text = json.load(open("flan/config.json"))
text.pop("scale_decoder_outputs", None)
json.dump({**text, "tie_word_embeddings": False}, open("flan/config.json", "w"))  # as google/flan-t5-* is published

T5ForConditionalGeneration.from_pretrained("flan").save_pretrained("again")
saved, stored = json.load(open("again/config.json")), load_file("again/model.safetensors")
differ = not torch.equal(stored["lm_head.weight"], stored["shared.weight"])
print("config saved again: tie_word_embeddings =", saved["tie_word_embeddings"])
print("config saved again: scale_decoder_outputs =", saved["scale_decoder_outputs"])
print("stored head differs from the embedding:", differ)
ids = torch.tensor([[3, 5, 7]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids).logits


model = T5ForConditionalGeneration.from_pretrained("again")
kept = logits(model)
model.tie_weights()  # what the saved flag asks for
moved = float((logits(model) - kept).abs().max())
print("logits move by", round(moved, 2), "when the flag is obeyed")
sys.exit(0 if saved["tie_word_embeddings"] is True and differ and moved > 0.1 else 1)
PYTHON
