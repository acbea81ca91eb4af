"""A tiny real model family for tests of the whole walk: a base and two fine-tunes that load in transformers.

torch and transformers are imported where models are made: who only asks for the merge need not wait for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CARD = "---\nlicense: {licence}\nlibrary_name: transformers\n---\n# {name}\n"


def make(folder: Path, *, licence: str = "apache-2.0") -> dict[str, Path]:
    """`base`, `left` and `right` as checkpoints with cards below `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    tokenizer = byte_tokenizer()
    made = {}
    for number, name in enumerate(("base", "left", "right")):
        with torch.no_grad():
            draw = torch.Generator().manual_seed(number)
            for parameter in base.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter) * 0.02 * (number > 0))
        made[name] = folder / name
        base.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
        (made[name] / "README.md").write_text(CARD.format(licence=licence, name=name))
    return made


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


RECIPE = """merge_method: task_arithmetic
base_model: alice/base
models:
- model: alice/left
  parameters: {weight: 1.0}
- model: alice/right
  parameters: {weight: 0.5}
dtype: bfloat16
"""
