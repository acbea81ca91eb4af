"""A tiny real Llama with a real tokenizer, and a small multiple-choice task in a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluators import harness
from evaluators.harness import EvalConfig, Question, RunOptions, folder_of
from evaluators.harness.scores import ModelEvaluation
from evaluators.harness.suites import Suite, SuiteTask

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "fish",
    "sits",
    "runs",
    "sings",
    "swims",
    "in",
    "on",
    "house",
    "tree",
    "water",
    "answer",
    "question",
    "which",
    "animal",
]
ANIMALS = ["cat", "dog", "bird", "fish"]


def model(
    folder: Path, *, seed: int = 0, chat_template: str | None = None, positions: int = 128, rows: int = 0
) -> Path:
    """Two layers, 32 wide, random weights; `rows` of the embedding, more than there are tokens, make logits large."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def suite(folder: Path, *, rows: int = 24, repo: str | None = None) -> Suite:
    """A task `which_animal` of `rows` questions with answers of one and two tokens; `repo` replaces its local data."""
    return Suite("animals", 1, (task(folder, "which_animal", rows, repo),))


def evaluate(model: Path, suite: Suite, **options: Any) -> ModelEvaluation:
    """`harness.evaluate` with the fields of Conditions and RunOptions as keywords."""
    conditions, run = (
        {name: options.pop(name) for name in kind.__slots__ if name in options} for kind in (EvalConfig, RunOptions)
    )
    return harness.evaluate(model, Question(suite, EvalConfig(**conditions)), RunOptions(**run), **options)


def logged(found: ModelEvaluation, cache: Path, task: str = "which_animal") -> list[dict[str, Any]]:
    """The samples of a task, as lm-eval logs them."""
    file = folder_of(found, cache) / "samples" / f"{task}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def spelled(number: int) -> str:
    """A number in words of the vocabulary: no two questions read alike."""
    return " ".join(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3))


def task(folder: Path, name: str, rows: int = 24, repo: str | None = None) -> SuiteTask:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    choices = [*ANIMALS, "fish house"]
    questions = [
        {"prompt": f"question {spelled(row)} animal {verb} {place} answer", "choices": choices, "answer": row % 5}
        for row in range(rows)
        for verb, place in [(("sits", "runs", "sings")[row % 3], ("in the house", "on a tree")[row % 2])]
    ]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    source = (
        f"dataset_path: {repo}" if repo else f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}"
    )
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
{source}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return SuiteTask(name, file=folder / f"{name}.yaml")
