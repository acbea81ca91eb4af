"""Tiny real models, built here: weights wide enough that their greedy text varies, and a real byte tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    HyperCLOVAXConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NanoChatConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3NextConfig,
)

from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.device_tree import DeviceTree
from evaluators.medusa.trees.tree import Tree

VOCAB = 300
EOS = 299
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant] "


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """Bytes as tokens 0..255, a few specials above; token 0 is an ordinary one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([f"<extra{index}>" for index in range(EOS - len(alphabet))] + ["<eos>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    wrapped.chat_template = template
    return wrapped


_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.35,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
_LLAMA = _SMALL | {"intermediate_size": 64, "max_position_embeddings": 256}
# Tied to an embedding that Gemma scales up, the head of a random model repeats its input for ever.
_GEMMA = _LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}
_MIXED = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "gqa": lambda: LlamaConfig(**_LLAMA, num_key_value_heads=2, head_dim=16),
    "mqa": lambda: LlamaConfig(**_LLAMA, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.35,
        bos_token_id=None, eos_token_id=EOS,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, init_std=0.35,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=None, eos_token_id=EOS, pad_token_id=None,
    ),
    "partial-rotary": lambda: GPTNeoXConfig(
        **_SMALL, intermediate_size=64, max_position_embeddings=128, rotary_pct=0.25
    ),
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    "window": lambda: MistralConfig(**_LLAMA, num_key_value_heads=2, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**_GEMMA, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, sliding_window=8, layer_types=_MIXED),
    "gemma3n": lambda: Gemma3nTextConfig(
        **_GEMMA | {"num_hidden_layers": 4}, sliding_window=8, layer_types=2 * _MIXED, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "cohere2": lambda: Cohere2Config(
        **_LLAMA | {"pad_token_id": 0}, num_key_value_heads=2, sliding_window=8, layer_types=_MIXED
    ),
    "qwen2-window": lambda: Qwen2Config(
        **_LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "gpt-oss": lambda: GptOssConfig(
        **_LLAMA, num_key_value_heads=2, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "longrope": lambda: LlamaConfig(**_LLAMA, rope_parameters=dict(_LONGROPE)),
    "phi3-longrope": lambda: Phi3Config(
        **_LLAMA, num_key_value_heads=2, rope_parameters=dict(_LONGROPE), original_max_position_embeddings=32
    ),
    "dynamic": lambda: LlamaConfig(
        **_LLAMA | {"max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "chunked": lambda: Llama4TextConfig(
        **_GEMMA, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=64
    ),
    "qwen3-next": lambda: Qwen3NextConfig(
        **_LLAMA | {"num_hidden_layers": 4}, head_dim=8, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "lfm2": lambda: Lfm2Config(**_LLAMA, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "latent": lambda: DeepseekV3Config(
        **_LLAMA, **_LATENT, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1,
    ),
    "minicpm3": lambda: MiniCPM3Config(**_LLAMA, **_LATENT, dim_model_base=8, scale_depth=1.4, scale_emb=3.0),
    "hyperclovax": lambda: HyperCLOVAXConfig(**_LLAMA, logits_scaling=0.3, embedding_multiplier=2.0),
    "nanochat": lambda: NanoChatConfig(**_LLAMA, num_key_value_heads=2, final_logit_softcapping=2.0),
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_key_value_heads=2, num_local_experts=4),
    "gptj": lambda: GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, initializer_range=0.35,
        bos_token_id=None, eos_token_id=EOS,
    ),
    "opt-projected": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, init_std=0.35,
        max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=None,
    ),
    "bert": lambda: BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.35, is_decoder=True, eos_token_id=EOS,
    ),
    "mrope": lambda: LlamaConfig(
        **_LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ),
    "mpt": lambda: MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon-alibi": lambda: FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}  # fmt: skip


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@cache
def base(kind: str) -> Base:
    """A shared, frozen model of this kind; do not change it."""
    return Base(model(kind), tokenizer())


def write(folder: Path, made: Any, template: str | None = TEMPLATE) -> Path:
    made.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def random_heads(on: Base, spec: HeadSpec, seed: int = 0) -> Heads:
    """Heads whose guesses are arbitrary."""
    heads = Heads(spec, on)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter))
    return heads.eval().requires_grad_(False)


def draft_logits(heads: Heads, on: Base) -> torch.Tensor:
    """What the heads say after seven hidden rows, always the same: [K, 7, V']."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return heads(torch.randn(7, on.hidden, generator=generator), torch.arange(7))


class Oracle:
    """Knows the text. Each step one branch of the tree, another each time, carries the truth down to some depth."""

    def __init__(self, text: Sequence[int], vocab: int = VOCAB) -> None:
        self.text, self.vocab, self.calls = list(text), vocab, 0

    def propose(self, h: torch.Tensor, root: int, seen: Sequence[int], tree: Tree) -> torch.Tensor:
        self.calls += 1
        last = tree.nodes - 1 - self.calls % max(1, tree.nodes // 2)
        branch = set(tree.ancestors(max(last, 0)))
        proposed = []
        for node in range(1, tree.nodes):
            at = len(seen) - 1 + tree.depth[node]
            truth = self.text[at] if at < len(self.text) else 0
            wrong = (truth + 1 + tree.paths[node - 1][-1]) % self.vocab
            proposed.append(truth if node in branch else wrong)
        return torch.tensor(proposed, dtype=torch.long)


class TensorOracle:
    """Knows the text. Each step one branch of the tree, by the position, carries the truth; no host is asked."""

    def __init__(self, text: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.text = torch.tensor([*text, *[0] * 16], device=device)
        self._trees: dict[Any, DeviceTree] = {}

    def propose(self, h: torch.Tensor, root: int, seen: Sequence[int], tree: Tree) -> torch.Tensor:
        at = torch.tensor([root, len(seen) - 1], device=h.device)
        return self.draft(h, at[:1], at[1:], tree)

    def draft(self, h: torch.Tensor, root: torch.Tensor, position: torch.Tensor, tree: Tree) -> torch.Tensor:
        if tree.paths not in self._trees:
            self._trees[tree.paths] = DeviceTree(tree, h.device)
        known = self._trees[tree.paths]
        truth = self.text[(position + known.depth).clamp(max=len(self.text) - 1)]
        branch = known.visible[(position * 7) % tree.nodes][0]
        return torch.where(branch, truth, (truth + 1 + known.index) % VOCAB)[1:]


class Always:
    """Proposes one token everywhere."""

    def __init__(self, token: int) -> None:
        self.token = token

    def propose(self, h: torch.Tensor, root: int, seen: Sequence[int], tree: Tree) -> torch.Tensor:
        return torch.full((tree.nodes - 1,), self.token, dtype=torch.long)
