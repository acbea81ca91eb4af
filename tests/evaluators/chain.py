"""A tiny model that says which word follows a word, with a word-level tokenizer: equal weights, answers by design."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("question", "one", "two", "three", "yes", "no", "true", "Task:", "Answer")
FOLLOWS = {"one": "yes", "two": "no", "three": "true", "yes": "one", "no": "two", "true": "three"}


def tokenizer(
    folder: Path, *, template: str = "$A", bos: str | None = "<s>", eos: str | None = "</s>", **settings: Any
) -> PreTrainedTokenizerFast:
    """`template` is what the tokenizer makes of a text, such as `<s> $A </s>`."""
    special = [each for each in ("<unk>", bos, eos) if each]
    ids = {word: number for number, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(each, ids[each]) for each in special]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token=bos, eos_token=eos, **settings
    )
    wrapped.save_pretrained(folder)
    return wrapped


def model(
    folder: Path, *, tie: bool = False, generation: Mapping[str, Any] | None = None, positions: int = 64, **words: Any
) -> Path:
    """After word i the model says FOLLOWS[i], or "Answer": attention and MLP are zero. `tie` is what config.json says;
    the head is stored all the same. `words` are for the tokenizer."""
    made = tokenizer(folder, **words)
    ids = made.convert_tokens_to_ids
    wide = (len(made) + 7) // 8 * 8
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=wide,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        eos_token_id=made.eos_token_id,
        bos_token_id=made.bos_token_id,
    )
    language_model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in language_model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        language_model.model.embed_tokens.weight[:, : len(made)] = torch.eye(len(made))
        language_model.lm_head.weight[ids("Answer"), :] = 0.5
        for word, following in FOLLOWS.items():
            language_model.lm_head.weight[ids(following), ids(word)] = 3.0
    language_model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "tie_word_embeddings": tie}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
