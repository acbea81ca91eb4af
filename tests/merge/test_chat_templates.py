"""The named chat templates give, through transformers, the prompts that the families document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_vocabulary import LINEAR, SHARED, model
from tiny_checkpoints import merge, plan_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bot.errors import Refused
from bot.merge.tokenizer.named_templates import TEMPLATES

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# name -> the whole talk, asking for an answer; and its second message alone, likewise
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
        f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\n",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
        "<s>[INST] Hi [/INST]",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_renders_what_its_family_documents(name: str) -> None:
    core = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[name]
    whole, first = EXPECTED[name]
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == whole
    assert tokenizer.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True) == first
    assert whole.startswith(tokenizer.apply_chat_template(TALK, tokenize=False))


def test_the_output_carries_the_named_template_and_missing_markers_are_noted(tmp_path: Path) -> None:
    for seed, name in enumerate("ax"):
        model(tmp_path / name, seed, SHARED)
    text = LINEAR + "chat_template: chatml"
    merge(text, tmp_path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(TALK[1:2], tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    codes = [notice.code for notice in plan_of(text, tmp_path)[0].notices]
    assert "CHAT_TOKENS_MISSING" in codes
    added = text + '\ntokenizer: {source: base, tokens: {"<|im_start|>": {}, "<|im_end|>": {}}}'
    assert "CHAT_TOKENS_MISSING" not in [notice.code for notice in plan_of(added, tmp_path)[0].notices]


def test_of_equally_common_templates_the_first_in_recipe_order_wins(tmp_path: Path) -> None:
    for seed, name in enumerate("ax"):
        model(tmp_path / name, seed, SHARED)
        file = tmp_path / name / "chat_template.json"
        file.write_text(json.dumps({"chat_template": {"default": f" {{{{ '{name}' }}}}\n", "tool": "{{ 'tool' }}"}}))
    planned, _ = plan_of(LINEAR + "chat_template: auto", tmp_path)
    assert planned.texts["chat_template.jinja"] == "{{ 'a' }}"


def test_an_unknown_name_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    for seed, name in enumerate("ax"):
        model(tmp_path / name, seed, SHARED)
    with pytest.raises(Refused) as caught:
        plan_of(LINEAR + "chat_template: chatlm", tmp_path)
    assert "`chatml`" in caught.value.next_step
