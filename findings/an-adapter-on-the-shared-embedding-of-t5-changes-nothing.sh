#!/usr/bin/env bash
# One would guess: LoRA on, or modules_to_save of, `shared` of a T5 or BART trains the embedding that encoder, decoder and
# head share. In fact transformers 5 gives encoder and decoder embeddings of their own, tied by weight, and `shared` is
# never called: PEFT wraps a module that nobody reads, so the adapter is trained, saved and loaded without any effect on
# the logits. trainable_token_indices on the same model changes what all of them read.
# Seen with peft 0.21.2, transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import peft
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

warnings.simplefilter("ignore")
transformers.logging.disable_progress_bar()
print("peft", peft.__version__, "transformers", transformers.__version__)
ids = torch.arange(3, 30)[None]
t5 = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
bart = BartConfig(
    vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, init_std=0.2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
)
attention = ["q", "q_proj"]  # PEFT wants a target beside; it changes nothing, its B stays zero
ways = {
    "modules_to_save": {"target_modules": attention, "modules_to_save": ["shared"]},
    "LoRA": {"target_modules": ["shared"]},
    "trained tokens": {"target_modules": attention, "trainable_token_indices": [5, 9]},
}
changed = True
for build, config in ((T5ForConditionalGeneration, t5), (BartForConditionalGeneration, bart)):
    for way, options in ways.items():
        torch.manual_seed(0)
        model = build(config).eval()
        with torch.no_grad():
            before = model(input_ids=ids, decoder_input_ids=ids).logits
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
            for name, weight in adapted.named_parameters():
                if weight.requires_grad and "shared" in name:
                    weight.add_(torch.randn_like(weight) * 0.3)
            moved = float((adapted(input_ids=ids, decoder_input_ids=ids).logits - before).abs().max())
        print(f"{build.__name__}, {way}: the logits move by {moved:.2g}")
        changed = changed and (moved > 0.01) == (way == "trained tokens")
if not changed:
    sys.exit("an adapter on the shared embedding has another effect now")
PYTHON
