"""`model.generate(custom_generate=...)`: the text of plain generate in fewer forward passes, or plain generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from tiny_heads import KEEP
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from evaluators.medusa import custom_generate
from evaluators.medusa.decoding.decode import Limits, baseline
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.formats.reading import CARRIED
from evaluators.medusa.formats.writing import save, write_generate_code
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Tree, chain, full
from tests.localhub.server import RunningHub, running_hub

PROMPT = [7, 8, 9, 250, 3]
NEW = 28  # fewer tokens than hidden dimensions, so that heads can know them all


def oracle(base: Base, heads: int = 3) -> Heads:
    """Heads that know the greedy text after PROMPT: projections that map each of its states to what follows."""
    trace = baseline(EagerRunner(base), PROMPT, Limits(NEW), keep_hidden=True)
    states, text = torch.stack(trace.hidden), torch.tensor(trace.tokens)
    made = Heads(HeadSpec("own", heads), base)
    for head in range(heads):
        right = F.one_hot(text[head + 1 :], base.vocab).float()
        made.unembed.data[head] = (torch.linalg.pinv(states[: len(right)]) @ right).T
    return made.eval().requires_grad_(False)


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1

    def since(self) -> int:
        counted, self.count = self.count, 0
        return counted


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([list(row) for row in (rows or (PROMPT,))])


def carry(heads: Heads, model: Path, tree: Tree | None = None) -> None:
    """Write the heads of a model and the code that uses them into its folder."""
    save(heads, model / CARRIED, tree=tree)
    write_generate_code(model)


def carrying(folder: Path, kind: str, tree: Tree | None, heads: Heads | None = None) -> Any:
    """A model loaded from a folder that carries heads."""
    base = Base(tiny.model(kind), tiny.tokenizer())
    tiny.write(folder, base.model)
    carry(oracle(base) if heads is None else heads, folder, tree=tree)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "gqa", "mqa", "gpt2", "opt", "partial-rotary"])
@pytest.mark.parametrize("tree", [chain(3), full((2, 2, 2)), None], ids=["chain", "full", "unnamed"])
def test_good_heads_write_the_text_of_plain_generate_in_a_third_of_the_passes(
    tmp_path: Path, kind: str, tree: Tree | None
) -> None:
    model = carrying(tmp_path, kind, tree)
    passes = Passes(model)
    want = model.generate(ids(), max_new_tokens=NEW, do_sample=False)
    plainly = passes.since()
    got = custom_generate.generate(model=model, input_ids=ids(), max_new_tokens=NEW, do_sample=False)
    assert got.tolist() == want.tolist()
    assert passes.since() <= plainly / 2.5
    assert not any("medusa" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "spec",
    [HeadSpec("shared", 3), HeadSpec("shared", 2, 2, True, KEEP), HeadSpec("own", 2, keep=KEEP)],
    ids=["shared", "conditioned", "own reduced"],
)
def test_bad_heads_of_any_kind_write_the_text_of_plain_generate_too(tmp_path: Path, spec: HeadSpec) -> None:
    base = tiny.base("gqa")
    heads = tiny.random_heads(base, spec)
    model = carrying(tmp_path, "gqa", full((7, 2)), heads)
    for length in (1, 2, 3, 40):
        want = model.generate(ids(), max_new_tokens=length, do_sample=False)
        got = custom_generate.generate(ids(), model=model, max_new_tokens=length, do_sample=False)
        assert got.tolist() == want.tolist()
    drafter = custom_generate._heads_of(model, None, {})
    h = torch.randn(base.hidden)
    want_ranks = heads.ranks(h[None], torch.tensor([9]), 4)[:, 0]
    assert drafter.ranks(h, torch.tensor(9), 4).tolist() == want_ranks.tolist()


def test_it_stops_where_plain_generate_stops(tmp_path: Path) -> None:
    model = carrying(tmp_path, "gqa", chain(3))
    text = model.generate(ids(), max_new_tokens=NEW, do_sample=False)[0, len(PROMPT) :].tolist()
    for stop in text[3:9]:
        asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": [stop, 298]}
        want = model.generate(ids(), **asked)
        assert custom_generate.generate(ids(), model=model, **asked).tolist() == want.tolist()


def test_it_ends_at_the_last_position_of_the_model(tmp_path: Path) -> None:
    model = carrying(tmp_path, "gpt2", full((2, 2)))
    asked = {"max_length": model.config.n_positions, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids(), **asked)
    assert want.shape[1] == model.config.n_positions
    assert custom_generate.generate(ids(), model=model, **asked).tolist() == want.tolist()


def test_a_streamer_gets_the_prompt_once_and_then_every_token(tmp_path: Path) -> None:
    model = carrying(tmp_path, "gqa", chain(3))
    for extra in ({}, {"repetition_penalty": 1.5}):
        streams = [TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True) for _ in range(2)]
        asked = {"max_new_tokens": 12, "do_sample": False, **extra}
        model.generate(ids(), streamer=streams[0], **asked)
        custom_generate.generate(ids(), model=model, streamer=streams[1], **asked)
        assert "".join(streams[1]) == "".join(streams[0])


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True, "top_k": 5}, {"num_beams": 2}, {"repetition_penalty": 1.7}, {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True}, {"cache_implementation": "static"},
        {"stop_strings": ["q"], "tokenizer": tiny.tokenizer()},
    ],
    ids=lambda asked: next(iter(asked)),
)  # fmt: skip
def test_what_heads_cannot_do_is_done_by_plain_generate(tmp_path: Path, asked: dict[str, Any]) -> None:
    model = carrying(tmp_path, "gqa", chain(3))
    asked = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **asked}
    torch.manual_seed(1)
    want = model.generate(ids(), **asked)
    torch.manual_seed(1)
    got = custom_generate.generate(ids(), model=model, **asked)
    same = [answer if torch.is_tensor(answer) else answer.sequences for answer in (got, want)]
    assert same[0].tolist() == same[1].tolist()


def test_batches_and_padding_are_left_to_plain_generate(tmp_path: Path) -> None:
    model = carrying(tmp_path, "gqa", chain(3))
    rows, mask = ids([0, 0, 7, 8], [4, 5, 6, 7]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(rows, **asked)
    assert custom_generate.generate(rows, model=model, **asked).tolist() == want.tolist()


@pytest.mark.parametrize("kind", ["window", "bloom", "falcon-alibi"])
def test_a_model_that_cannot_hold_a_tree_generates_plainly(tmp_path: Path, kind: str) -> None:
    model = tiny.model(kind)
    tiny.write(tmp_path, model)
    carry(oracle(tiny.base("gqa")), tmp_path, tree=chain(3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    asked = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids(), **asked)
    assert custom_generate.generate(ids(), model=model, **asked).tolist() == want.tolist()


def test_a_repo_without_heads_or_with_another_models_says_so(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.model("gqa"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="carries no Medusa heads"):
        custom_generate.generate(ids(), model=model, max_new_tokens=3)
    carry(tiny.random_heads(Base(tiny.model("gqa", hidden_size=16), tiny.tokenizer()), HeadSpec()), tmp_path)
    with pytest.raises(ValueError, match="not made for a model of hidden size 32"):
        custom_generate.generate(ids(), model=model, max_new_tokens=3)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        yield running


@pytest.mark.slow
def test_transformers_loads_it_from_a_repo_and_from_a_folder_and_only_when_trusted(
    tmp_path: Path, hub: RunningHub
) -> None:
    carrying(tmp_path / "model", "gqa", chain(3))
    code = f"""
        import torch
        from transformers import AutoModelForCausalLM
        api.create_repo("alice/merged")
        api.upload_folder(repo_id="alice/merged", folder_path={str(tmp_path / "model")!r})
        asked = {{"input_ids": torch.tensor([{PROMPT}]), "max_new_tokens": {NEW}, "do_sample": False}}
        passes, result = [0], []
        for source in ("alice/merged", {str(tmp_path / "model")!r}):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
            want, plainly = model.generate(**asked).tolist(), passes[0]
            got = model.generate(**asked, custom_generate=source, trust_remote_code=True).tolist()
            try:
                model.generate(**asked, custom_generate=source, trust_remote_code=False)
                refused = False
            except ValueError:
                refused = True
            trusted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=True)
            result.append([got == want, plainly, passes[0] - plainly, refused,
                           trusted.generate(asked["input_ids"], max_new_tokens={NEW}).tolist() == want])
            passes[0] = 0
    """
    for same, plainly, with_heads, refused, always in hub.client(code, tmp_path / "home", user="alice"):
        assert same and refused and always
        assert with_heads <= plainly / 2.5
