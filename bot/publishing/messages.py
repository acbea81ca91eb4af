"""Sentences for people outside of errors: replies on a requesting repo, texts of a card."""

from __future__ import annotations

OPENING = (
    "This repo asks mergebot for a merge. The outcome is written below when it is known; "
    "to withdraw the request, remove the `mergebot` tag from the model card."
)
TITLE = "mergebot: request {key}"
PUBLISHED = "Published as [{repo}]({url}) at commit `{commit}`.\n\n{scores}"
FAILED = "The merge could not be made ({code}): {sentence} {next_step}"
REFUSED = "The request was refused ({code}): {sentence} {next_step}"
CANCELLED = "The request was cancelled; nothing was published."
REFERENCE = "ref: mergebot/{key}/{event}"

NOT_MEASURED = "The request asked for no evaluation."
NO_SPEED = "The request asked for no decode-speed test."
CAUTION = (
    "Scores are taken by mergebot from the exact files of this repo. They say nothing about tasks that were not run, "
    "and a task that leaked into a source's training data flatters the merge as it flatters the source."
)
FIRST_LOOK = (
    "One plain text that was written for this check, and the greedy continuation of four beginnings: enough to see a "
    "model that is broken, too little to rank models that are not."
)
USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")"""
HEADS = (
    "`medusa/` holds Medusa heads for exactly these weights. With them greedy generation takes fewer forward passes; "
    "its text is that of plain generation token for token in float32, and in 16 bit until rounding decides between two "
    "nearly equal tokens:"
)
USE_HEADS = """inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(
    **inputs, do_sample=False, max_new_tokens=100, custom_generate="{repo}", trust_remote_code=True
)
print(tokenizer.decode(output[0]))"""
HEADS_CAUTION = (
    "`trust_remote_code=True` runs `custom_generate/generate.py` of this repo, some 200 lines to read first. Whether "
    "fewer passes are faster depends on the machine, see the decode speed above. Sampling, beams and batches are left "
    "to plain generation."
)
REPRODUCE = (
    "`mergekit_config.yml` is the recipe with every source pinned to a commit, `merge_provenance.json` lists the "
    "source commits, the engine and the sha256 of every file. `mergebot merge mergekit_config.yml OUT` makes it again."
)
