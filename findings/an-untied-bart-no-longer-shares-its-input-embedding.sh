#!/usr/bin/env bash
# One would guess: `tie_word_embeddings: false` of a BART frees the head only; encoder and decoder still read the one
# `model.shared.weight`, as its name says. In transformers 5 the flag unties all three: encoder and decoder get embeddings
# of their own, which `save_pretrained` stores too. A file that holds `model.shared.weight` and a head of its own once
# loads with random input embeddings, and `model.shared.weight` is read by nothing.
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration

transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__)
torch.manual_seed(0)
config = BartConfig(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, tie_word_embeddings=False,
)
BartForConditionalGeneration(config).save_pretrained("bart")
tensors = load_file("bart/model.safetensors")
copies = [name for name in tensors if name.endswith("coder.embed_tokens.weight")]
print("stored beside model.shared.weight:", copies)
kept = {name: tensor for name, tensor in tensors.items() if name not in copies}
save_file(kept, "bart/model.safetensors", metadata={"format": "pt"})
model, report = BartForConditionalGeneration.from_pretrained("bart", output_loading_info=True)
print("missing:", sorted(report["missing_keys"]))
shared = torch.equal(model.get_encoder().embed_tokens.weight, model.model.shared.weight)
print("the encoder reads model.shared.weight:", shared)
sys.exit(0 if len(copies) == 2 and set(report["missing_keys"]) == set(copies) and not shared else 1)
PYTHON
