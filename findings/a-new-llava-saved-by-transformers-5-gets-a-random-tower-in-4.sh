#!/usr/bin/env bash
# One would guess: `save_pretrained` of transformers 5 writes names that transformers 4 reads, as it turns every other
# name back (`model.language_model` into `language_model.model`). The tower of a LLaVA (CLIP) or a Gemma 3 (SigLIP) that
# was not loaded from a published file is saved as `vision_tower.encoder...`; published files and transformers 4.57 say
# `vision_tower.vision_model.encoder...`. There the whole tower is initialised at random; text alone is answered as before.
# Seen with transformers 5.23.0, 4.57.6 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 5.23.0 4.57.6; do
    python3 -m venv "$version"
    "$version/bin/pip" install -q torch==2.13.0 "transformers==$version"
done
cat >read.py <<'PYTHON'
import sys

import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
if transformers.__version__.startswith("5"):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14),
        text_config=LlamaConfig(**size, vocab_size=64), image_token_id=63,
    )
    LlavaForConditionalGeneration(config).save_pretrained("llava")
_, report = LlavaForConditionalGeneration.from_pretrained("llava", output_loading_info=True)
missing = sorted(report["missing_keys"])
print("transformers", transformers.__version__, "misses", len(missing), "tensors:", missing[:1])
blind = bool(missing) and all(".vision_tower.vision_model." in name for name in missing)
sys.exit(0 if blind == (sys.argv[1] == "blind") and blind == bool(missing) else 1)
PYTHON
5.23.0/bin/python read.py whole
4.57.6/bin/python read.py blind
