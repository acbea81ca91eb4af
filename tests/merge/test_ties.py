"""Ties follow from the stored tensors. The oracle is `from_pretrained` of transformers on the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_families import DECODER, FAMILIES, SEEING, SHORT
from tiny_checkpoints import llama_tensors, load, merge, plan_of, save
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import LocalFiles, open_checkpoint
from bot.merge.execution import engine
from bot.merge.planning.byte_ranges import needed
from bot.merge.recipe.spec import ModelRef

Tensors = dict[str, torch.Tensor]
TIED_PAIR = ("lm_head.weight", "model.embed_tokens.weight")
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip


def gemma3() -> Any:
    text = hf.Gemma3TextConfig(**DECODER, head_dim=8)
    return hf.Gemma3Config(text_config=text, vision_config=hf.SiglipVisionConfig(**SEEING, image_size=28))


MORE: dict[str, tuple[str, Callable[[], Any]]] = {
    "gemma3_vision": ("Gemma3ForConditionalGeneration", gemma3),
    "bloom": ("BloomForCausalLM", lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": ("FalconForCausalLM", lambda: hf.FalconConfig(**SHORT)),
    "opt": ("OPTForCausalLM", lambda: hf.OPTConfig(**SHORT, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        lambda: hf.GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
            max_position_embeddings=64,
        ),
    ),
    "mpt": (
        "MptForCausalLM",
        lambda: hf.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    ),
    "roberta": ("RobertaForMaskedLM", lambda: hf.RobertaConfig(**SHORT)),
    "modernbert": ("ModernBertForMaskedLM", lambda: hf.ModernBertConfig(**SHORT, cls_token_id=1, sep_token_id=2)),
    "gte": ("GteForMaskedLM", lambda: hf.GteConfig(**SHORT)),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        lambda: hf.SwitchTransformersConfig(**T5, num_decoder_layers=2, num_experts=2, expert_capacity=8),
    ),
    "mt5": ("MT5ForConditionalGeneration", lambda: hf.MT5Config(**T5)),
    "bart": ("BartForConditionalGeneration", lambda: hf.BartConfig(**SEQ2SEQ)),
}  # fmt: skip
ALL = {**FAMILIES, **MORE}
STORED = ("tied", "untied", "other head", "equal head", "only the head")


def logits(kind: Any, folder: Path) -> torch.Tensor:
    """The model's answer to some tokens; every tensor comes from the folder."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    tokens = torch.tensor([[3, 5, 7, 11, 60, 61, 9]])
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False, **more).logits


def rewrite(folder: Path, tensors: Mapping[str, torch.Tensor], tied: bool | None) -> None:
    """Put other tensors and another flag into a saved model."""
    stored = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
        if tied is not None:
            part["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))


def saved(kind: Any, config: Any, folder: Path, how: str) -> None:
    """A model of a family whose embedding and head are stored in one of the ways of `STORED`."""
    untied = config()
    untied.tie_word_embeddings = False
    kind(untied).save_pretrained(folder)
    names = set(load_file(folder / "model.safetensors"))
    tied = config()
    tied.tie_word_embeddings = True
    model = kind(tied)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    ties = {target: source for target, source in model.all_tied_weights_keys.items() if target.endswith(".weight")}
    target = next(name for name in ties if "embed_tokens" not in name)
    more = [name for name in names - set(tensors) if name.endswith("weight") and "embed_tokens" not in name]
    head = more[0] if more else target  # by the name under which it is saved
    matrix = model.get_parameter(ties[target])
    source = next(name for name, tensor in tensors.items() if tensor.shape == matrix.shape and tensor.equal(matrix))
    if how == "untied":
        copies = {name: tensors[source] for name in names - set(tensors) if not name.endswith("bias")}
        biases = {name: tensors[name.replace("decoder.", "")] for name in names - set(tensors) if name.endswith("bias")}
        tensors |= {**copies, **biases, head: torch.randn_like(matrix)}
    elif how == "other head":
        tensors[head] = torch.randn_like(matrix)
    elif how == "equal head":
        tensors[head] = tensors[source]
    elif how == "only the head":
        tensors[head] = tensors.pop(source)
    rewrite(folder, tensors, how != "untied")


@pytest.mark.slow
@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("family", ALL)
def test_a_passthrough_computes_what_transformers_loads_from_its_parent(family: str, how: str, tmp_path: Path) -> None:
    name, config = ALL[family]
    kind = getattr(hf, name)
    torch.manual_seed(0)
    saved(kind, config, tmp_path / "a", how)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    torch.testing.assert_close(logits(kind, tmp_path / "out"), logits(kind, tmp_path / "a"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["cpmant", "xlstm"])
def test_a_head_equal_to_its_embedding_is_kept_where_the_family_never_ties(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, config = {
        "cpmant": (
            hf.CpmAntForCausalLM,
            hf.CpmAntConfig(
                vocab_size=64, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2
            ),
        ),
        "xlstm": (hf.xLSTMForCausalLM, hf.xLSTMConfig(vocab_size=64, hidden_size=32, num_heads=4, num_blocks=2)),
    }[family]
    kind(config).save_pretrained(tmp_path / "a")
    tensors = load(tmp_path / "a")
    if family == "xlstm":
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
        rewrite(tmp_path / "a", tensors, None)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    assert set(load(tmp_path / "out")) == set(tensors)
    torch.testing.assert_close(logits(kind, tmp_path / "out"), logits(kind, tmp_path / "a"), rtol=0, atol=1e-6)


def flan(folder: Path, again: bool) -> None:
    """A model like Flan-T5: a head of its own under a flag that means no scaling; `again`: saved by transformers 5."""
    torch.manual_seed(0)
    hf.T5ForConditionalGeneration(hf.T5Config(**T5)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {**tensors, "lm_head.weight": torch.randn(64, 32)}, tied=False)
    config = json.loads((folder / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(config))
    if again:
        hf.T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_flan_t5_keeps_its_head_and_does_not_scale(again: bool, tmp_path: Path) -> None:
    flan(tmp_path / "a", again)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    kind = hf.T5ForConditionalGeneration
    torch.testing.assert_close(logits(kind, tmp_path / "out"), logits(kind, tmp_path / "a"), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config.get("scale_decoder_outputs", False) is False


LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\ndtype: float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("tied", "other head"), ("only the head", "untied"), ("equal head", "tied")]
)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert", "bart", "t5", "gemma3_vision"])
def test_a_mean_of_two_ways_to_store_is_the_mean_of_the_loaded_models(
    family: str, first: str, second: str, tmp_path: Path
) -> None:
    name, config = ALL[family]
    kind = getattr(hf, name)
    for seed, (folder, how) in enumerate((("a", first), ("b", second))):
        torch.manual_seed(seed)
        saved(kind, config, tmp_path / folder, how)
    merge(LINEAR, tmp_path, tmp_path / "out")
    one, other, made = (kind.from_pretrained(tmp_path / part, dtype=torch.float32) for part in ("a", "b", "out"))
    for key, tensor in made.state_dict().items():
        mean = (one.state_dict()[key] + other.state_dict()[key]) / 2
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)
    tied = {first, second} <= {"tied", "equal head"}
    config_out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_out.get("tie_word_embeddings", True) is tied


def test_an_equal_head_is_written_once(tmp_path: Path) -> None:
    tensors = llama_tensors(0, tied=True)
    save(tmp_path / "a", {**tensors, "lm_head.weight": tensors[TIED_PAIR[1]].clone()}, tie_word_embeddings=True)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    assert set(load(tmp_path / "out")) == set(tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_head_that_differs_in_one_number_is_kept(tmp_path: Path) -> None:
    tensors = llama_tensors(0, tied=True)
    head = tensors[TIED_PAIR[1]].clone()
    head[7, 3] += 1
    save(tmp_path / "a", {**tensors, "lm_head.weight": head}, tie_word_embeddings=True)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["lm_head.weight"], head)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_config_that_says_nothing_of_ties_says_so_in_the_output(tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(0), tie_word_embeddings=None)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


class Away:
    """The files of a folder as if they lay on the Hub: whole tensors are not read while a merge is planned."""

    def __init__(self, folder: Path) -> None:
        self._files = LocalFiles(folder)
        self.bytes_read = 0

    def __str__(self) -> str:
        return str(self._files)

    def sizes(self) -> dict[str, int]:
        return self._files.sizes()

    def read(self, name: str, start: int, length: int) -> bytes:
        self.bytes_read += length
        return self._files.read(name, start, length)


@pytest.mark.parametrize("equal", [True, False])
def test_on_the_hub_samples_are_compared_and_the_whole_before_the_merge(equal: bool, tmp_path: Path) -> None:
    from bot.merge.planning import planner
    from bot.merge.recipe import reading as recipe

    tensors = {**llama_tensors(0, tied=True), TIED_PAIR[1]: torch.randn(40_000, 8)}
    head = tensors[TIED_PAIR[1]].clone()
    if not equal:
        head[25_000] += 1  # between two samples
    folder = save(tmp_path / "a", {**tensors, "lm_head.weight": head}, tie_word_embeddings=True, vocab_size=40_000)
    files = Away(folder)
    opened = open_checkpoint(files, name="o/a")
    assert files.bytes_read < head.nbytes / 2
    parsed = recipe.parse("merge_method: passthrough\nmodels: [{model: o/a}]")
    made = planner.make(parsed, {ModelRef("o/a"): opened})
    assert "lm_head.weight" not in {step.name for step in made.steps}
    fetched = needed(made)[ModelRef("o/a")]["model.safetensors"]
    assert sum(end - start for start, end in fetched) > 2 * head.nbytes
    if equal:
        engine.merge(made, {ModelRef("o/a"): folder}, tmp_path / "out")
        assert set(load(tmp_path / "out")) == set(tensors)
        return
    with pytest.raises(Refused) as caught:
        engine.merge(made, {ModelRef("o/a"): folder}, tmp_path / "out")
    assert "tie_word_embeddings to false" in caught.value.next_step
    assert not (tmp_path / "out").exists()


def test_a_head_without_an_embedding_of_a_known_name_is_refused(tmp_path: Path) -> None:
    tensors = {name.replace("layers", "towers"): tensor for name, tensor in llama_tensors(0).items()}
    del tensors[TIED_PAIR[1]]
    config = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    folder = save(tmp_path / "a", llama_tensors(0), **config)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Refused) as caught:
        open_checkpoint(LocalFiles(folder))
    assert caught.value.code == "TENSOR_MISSING"


def test_a_stack_of_a_tied_and_an_untied_model_takes_each_end_from_its_own(tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(0, tied=True))
    save(tmp_path / "b", llama_tensors(1), tie_word_embeddings=True)  # stores another head all the same
    text = (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]},"
        " {sources: [{model: b, layer_range: [0, 2]}]}]"
    )
    planned, _ = plan_of(text, tmp_path)
    head = next(step for step in planned.steps if step.name == "lm_head.weight")
    assert [str(operand.model) for operand in head.work.operands] == ["b"]
    assert json.loads(planned.config)["tie_word_embeddings"] is False


def test_the_programs_of_2023_read_ties_as_every_recipe_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a", llama_tensors(0), tie_word_embeddings=True)  # a head of its own
    alone = llama_tensors(1)
    del alone[TIED_PAIR[1]]
    save(tmp_path / "b", alone, tie_word_embeddings=True)  # its head is the embedding
    runner = CliRunner()
    arguments = "classic classic --merge a --merge b --weight 0.5 --weight 0.5 --method linear --no-bf16"
    (tmp_path / "stack.yml").write_text(
        "embedding_source: b\nlm_head_source: a\n"
        "layer_slices: [{model: b, start: 0, end: 1}, {model: a, start: 1, end: 2}]"
    )
    for line in (arguments, "bakllama stack.yml stack"):
        result = runner.invoke(app, ["--home", "home", *line.split()], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    first = hf.LlamaForCausalLM.from_pretrained("a").state_dict()
    second = hf.LlamaForCausalLM.from_pretrained("b").state_dict()
    both = load(tmp_path / "classic")
    torch.testing.assert_close(both[TIED_PAIR[1]], (first[TIED_PAIR[1]] + second[TIED_PAIR[1]]) / 2)
    assert torch.equal(both["lm_head.weight"], first["lm_head.weight"])  # as in 2023, no embedding stands in for a head
    stack = hf.LlamaForCausalLM.from_pretrained("stack").state_dict()
    assert torch.equal(stack[TIED_PAIR[1]], second[TIED_PAIR[1]])
    assert torch.equal(stack["lm_head.weight"], first["lm_head.weight"])


@pytest.mark.parametrize("how", ["equal", "other", "only the head"])
def test_a_merge_of_tied_models_is_verified(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = llama_tensors(0)
    if how == "equal":
        tensors["lm_head.weight"] = tensors[TIED_PAIR[1]].clone()
    if how == "only the head":
        del tensors[TIED_PAIR[1]]
    save(tmp_path / "a", tensors, tie_word_embeddings=True)
    save(tmp_path / "b", llama_tensors(1, tied=True))
    (tmp_path / "r.yml").write_text(LINEAR)
    for line in ("merge r.yml out", "verify out", "plan r.yml"):
        result = CliRunner().invoke(app, ["--home", "home", *line.split()], catch_exceptions=False)
        assert result.exit_code == 0, result.output
