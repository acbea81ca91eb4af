#!/usr/bin/env bash
# One would guess: lm-eval's HFLM, given a model that transformers has loaded, measures that model. HFLM calls
# `model.tie_weights()`, which follows config.json alone. Where the config ties the head and the file holds a head of its
# own, `from_pretrained` keeps the stored head and HFLM replaces it by the embeddings: another model is measured.
# Seen with lm-eval 0.4.13, transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 "lm-eval[hf]==0.4.13"
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

transformers.logging.set_verbosity_error()
print("lm-eval", lm_eval.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
config = Qwen2Config(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)
Qwen2ForCausalLM(config).save_pretrained("model")
tensors = load_file("model/model.safetensors")
head = torch.randn(16, 16)
save_file({**tensors, "lm_head.weight": head}, "model/model.safetensors", metadata={"format": "pt"})
model = AutoModelForCausalLM.from_pretrained("model")
kept = torch.equal(model.lm_head.weight, head)
print("from_pretrained keeps the stored head:", kept)
measured = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).model
replaced = torch.equal(measured.lm_head.weight, measured.model.embed_tokens.weight)
print("HFLM measures the embeddings as the head:", replaced)
sys.exit(0 if kept and replaced else 1)
PYTHON
