#!/usr/bin/env bash
# One would guess: lm-eval scores the tokens of an answer, whatever the tokenizer adds to a text. It takes what follows the
# first len(question) tokens of question + answer. A tokenizer that appends its end token makes the question one token
# longer, so of a one-token answer only the end token is left, asked for after the ended question: every choice gets the
# same log-likelihood, and the first one wins.
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
print("lm-eval", lm_eval.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
)


def answers(template: str) -> list[tuple[list[int], list[int]]]:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "q": 2, "yes": 3, "no": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    return [lm._encode_pair("q", answer) for answer in (" yes", " no")]


plain, ending = answers("$A"), answers("$A </s>")
print("question and answer that are scored:", plain)
print("with a tokenizer that appends </s>:", ending)
sys.exit(0 if [each[1] for each in plain] == [[3], [4]] and [each[1] for each in ending] == [[1], [1]] else 1)
PYTHON
