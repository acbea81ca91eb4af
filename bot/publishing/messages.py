"""Sentences for people outside of errors: replies on a requesting repo, texts of a card."""

from __future__ import annotations

OPENING = (
    "This repo requests a merge from mergebot. The outcome is posted below; "
    "to withdraw the request, remove the `mergebot` tag from the model card."
)
TITLE = "mergebot: request {key}"
PUBLISHED = "Published as [{repo}]({url}) at commit `{commit}`.\n\n{scores}"
FAILED = "The merge failed ({code}): {sentence} {next_step}"
REFUSED = "The request was refused ({code}): {sentence} {next_step}"
CANCELLED = "The request was cancelled; nothing was published."
REFERENCE = "ref: mergebot/{key}/{event}"

NOT_MEASURED = "No evaluation was requested."
NO_SPEED = "No speed test was requested."
CAUTION = (
    "mergebot measured the scores on exactly the files of this repo. They do not cover tasks that were not run. A task "
    "that is part of a source's training data raises the score of the source and of the merge."
)
FIRST_LOOK = (
    "Likelihood of one text that was written for this check, and greedy continuations of four prompts. The check "
    "detects broken models; it does not rank working ones."
)
USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")"""
HEADS = (
    "`medusa/` holds Medusa heads for exactly these weights. They reduce the forward passes of greedy generation. "
    "Their text equals that of baseline generation token for token in float32; in 16 bit, rounding can decide "
    "otherwise between two nearly equal tokens:"
)
USE_HEADS = """inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(
    **inputs, do_sample=False, max_new_tokens=100, custom_generate="{repo}", trust_remote_code=True
)
print(tokenizer.decode(output[0]))"""
HEADS_CAUTION = (
    "`trust_remote_code=True` runs `custom_generate/generate.py` of this repo, about 200 lines; read it first. Whether "
    "fewer passes are faster depends on the machine (see the decode speed above). Sampling, beam search and batches "
    "use baseline generation."
)
REPRODUCE = (
    "`mergekit_config.yml` is the recipe with every source pinned to a commit, `merge_provenance.json` lists the "
    "source commits, the engine and the sha256 of every file. `mergebot merge mergekit_config.yml OUT` repeats it."
)
