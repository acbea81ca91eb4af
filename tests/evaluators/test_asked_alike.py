"""Equal weights give equal answers, whatever the files beside them say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, T5Config
from transformers.models.auto import AutoModelForSeq2SeqLM

from bot.errors import EvaluationError
from evaluators import comparison, loading
from evaluators.comparison.remarks import remarks
from evaluators.comparison.verdict import Outcome
from evaluators.harness.lengths import cut_prompts
from evaluators.harness.neutral_lm import NeutralLM
from evaluators.harness.process import require_chat_template
from evaluators.harness.scores import Cut
from evaluators.harness.suites import Suite, SuiteTask
from tests.evaluators import chain, tiny_harness

CHOICES = (" yes", " no", " true")
QUESTIONS = ("question one", "question two", "question three")
FEW = {"vocab_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}


def asked(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """lm-eval's model over `folder`, as the evaluation builds it."""
    return NeutralLM(*loading.load(folder, dtype=dtype))


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]  # type: ignore[arg-type]


def choices(lm: Any, chosen: tuple[str, ...] = CHOICES) -> list[Any]:
    """The log-likelihood of every choice to every question."""
    pairs = [(question, choice) for question in QUESTIONS for choice in chosen]
    found: list[Any] = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    return found


def written(lm: Any, **settings: Any) -> list[str]:
    wanted = {"until": ["question"], "max_gen_toks": 6, "do_sample": False, **settings}
    asked_for = instances("generate_until", *((question, wanted) for question in QUESTIONS))
    found: list[str] = lm.generate_until(asked_for, disable_tqdm=True)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return asked(chain.model(tmp_path_factory.mktemp("plain")))


# -- the head ------------------------------------------------------------------------------------------------------


def test_a_stored_head_of_a_tied_config_is_the_one_that_answers(plain: Any, tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, tie=True))
    assert choices(lm) == choices(plain)
    assert lm.facts["kept_apart"] == ["lm_head.weight"] and plain.facts["kept_apart"] == []


@pytest.mark.parametrize(
    ("auto", "config"),
    [
        (AutoModelForCausalLM, GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        (
            AutoModelForCausalLM,
            Qwen2Config(**FEW, intermediate_size=16, num_key_value_heads=1, tie_word_embeddings=True),
        ),
        (
            AutoModelForSeq2SeqLM,
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0),
        ),
    ],
    ids=["gpt2", "qwen2", "t5"],
)
def test_every_family_is_measured_with_the_weights_that_transformers_loads(
    auto: Any, config: Any, tmp_path: Path
) -> None:
    auto.from_config(config).save_pretrained(tmp_path)
    chain.tokenizer(tmp_path)
    head = torch.randn(32, 16, generator=torch.Generator().manual_seed(3))
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": head}, file, metadata={"format": "pt"})
    lm = asked(tmp_path)
    assert torch.equal(lm.model.get_output_embeddings().weight, head)
    assert lm.facts["kept_apart"] == ["lm_head.weight"]


# -- the tokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "<s> $A </s> </s>"])
def test_an_end_token_that_a_tokenizer_appends_is_never_asked(template: str, plain: Any, tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, template=template))
    assert choices(lm) == choices(plain)
    assert written(lm) == written(plain) and written(plain)[0].startswith("yes one")
    assert lm.tok_encode("question one") == lm.tok_encode("question one </s>")[:-1]
    assert lm.facts["dropped_end"] == ["</s>"] * template.count("</s>")


def test_a_text_that_is_scored_as_a_whole_gives_only_its_own_tokens_a_probability(plain: Any, tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, template="<s> $A"))
    text = "question one yes"
    [found] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        logs = lm.model(ids).logits.log_softmax(-1)
    assert found == pytest.approx(float(logs[0, :-1].gather(1, ids[0, 1:, None]).sum()))
    assert [found] == plain.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert lm.tok_encode(text)[0] == lm.tokenizer.bos_token_id


def test_a_tokenizer_without_begin_and_end_tokens_is_named_as_the_cause(tmp_path: Path) -> None:
    chain.model(tmp_path)
    chain.tokenizer(tmp_path, bos=None, eos=None)
    with pytest.raises(
        EvaluationError, match=r"neither a begin token \(bos_token\) nor an end token \(eos_token\)"
    ) as caught:
        asked(tmp_path)
    assert "eos_token" in caught.value.next_step


def test_a_missing_end_token_stops_only_written_answers(tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, eos=None))
    assert len(choices(lm)) == 9
    with pytest.raises(ValueError, match="no end token"):
        written(lm)


def test_a_tokenizer_that_does_not_name_the_attention_mask_writes_as_before(plain: Any, tmp_path: Path) -> None:
    file = chain.model(tmp_path) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": ["input_ids"]}))
    assert written(asked(tmp_path)) == written(plain)


def test_differences_in_tokens_and_attention_are_kept_with_the_result(plain: Any, tmp_path: Path) -> None:
    folder = chain.model(tmp_path, bos=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_attn_implementation": "eager"}))
    splitting = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**splitting, "pre_tokenizer": {"type": "Whitespace"}}))
    lm = asked(folder)
    names = ("before_whole", "attention")
    assert [plain.facts[name] for name in names] == [["<s>"], "sdpa"]
    assert [lm.facts[name] for name in names] == [["</s>"], "eager"]
    assert lm.facts["splits"] != plain.facts["splits"]


# -- the settings of generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"max_new_tokens": 1},
        {"suppress_tokens": [7]},
        {"num_beams": 3, "length_penalty": 4.0},
        {"min_new_tokens": 5, "forced_eos_token_id": 2},
        {"sequence_bias": [[[7], -9.0]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_settings_of_a_model_do_not_steer_its_answers(
    settings: dict[str, Any], plain: Any, tmp_path: Path
) -> None:
    lm = asked(chain.model(tmp_path, generation={**settings, "eos_token_id": 2, "temperature": 0.6, "do_sample": True}))
    assert written(lm) == written(plain)
    assert {each.partition("=")[0] for each in lm.facts["ignored_settings"]} == set(settings)


def test_generation_settings_in_config_json_do_not_steer_either(plain: Any, tmp_path: Path) -> None:
    folder = chain.model(tmp_path)
    (folder / "generation_config.json").unlink()
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "repetition_penalty": 5.0}))
    lm = asked(folder)
    assert written(lm) == written(plain)
    assert lm.facts["ignored_settings"] == ["repetition_penalty=5.0"]


def test_the_end_tokens_of_a_model_stay_its_own(plain: Any, tmp_path: Path) -> None:
    end = plain.tokenizer.convert_tokens_to_ids("one")
    lm = asked(chain.model(tmp_path, generation={"eos_token_id": [2, end]}))
    assert written(lm)[0] == "yes one" and len(written(plain)[0].split()) == 6
    assert lm.facts["ends"] == [2, end] and lm.facts["ignored_settings"] == []


def test_answers_that_differ_in_bfloat16_do_not_tie(tmp_path: Path) -> None:
    folder = chain.model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    ids = chain.tokenizer(folder).convert_tokens_to_ids
    head = torch.zeros_like(tensors["lm_head.weight"])
    for word, logit in (("question", 20.0), ("yes", 1.0), ("no", 1.0078125)):
        head[ids(word), ids("one")] = logit / math.sqrt(head.shape[1])
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    yes, no, _ = choices(asked(folder, torch.bfloat16))[:3]
    assert no[0] > yes[0]


def test_a_config_that_asks_for_tuples_in_place_of_named_outputs_is_measured(plain: Any, tmp_path: Path) -> None:
    file = chain.model(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "return_dict": False}))
    lm = asked(tmp_path)
    assert choices(lm) == choices(plain) and written(lm) == written(plain)


# -- chat templates ------------------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}Answer"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
SILENT = "{% for m in messages if m.role != 'system' %}{{ m.role }} {{ m.content }} {% endfor %}Answer"
CHAT = [{"role": "system", "content": "Task: yes or no"}, {"role": "user", "content": "question one"}]


@pytest.mark.parametrize("template", [NO_SYSTEM + TURNS.removeprefix("{% for m in messages %}"), SILENT])
def test_a_description_stays_where_a_template_has_no_system_role(template: str, tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, chat_template=template))
    assert lm.apply_chat_template(CHAT) == "user Task: yes or no\n\nquestion one Answer"
    assert CHAT[1]["content"] == "question one"


def test_a_template_with_a_system_role_is_used_as_it_is(tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, chat_template=TURNS))
    assert lm.apply_chat_template(CHAT) == "system Task: yes or no user question one Answer"


def test_a_template_that_prints_the_date_gives_the_same_prompt_every_day(tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, chat_template=" {{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"))
    assert lm.apply_chat_template(CHAT[1:]) == " 26 Jul 2024 question one"


@pytest.mark.parametrize("template", ["{% for x %}", {"one": TURNS, "two": TURNS}, "{{ raise_exception('never') }}"])
def test_a_template_that_cannot_be_applied_is_named_before_anything_is_asked(
    template: Any, plain: Any, tmp_path: Path
) -> None:
    lm = asked(chain.model(tmp_path))
    lm.tokenizer.chat_template = template
    with pytest.raises(EvaluationError, match="chat template cannot be applied: ") as caught:
        require_chat_template(lm)
    assert caught.value.code == "NO_CHAT_TEMPLATE"
    lm.tokenizer.chat_template = TURNS
    require_chat_template(lm)


# -- lengths -------------------------------------------------------------------------------------------------------


def sample(*arguments: tuple[Any, ...], kind: str = "none") -> dict[str, Any]:
    return {"filter": kind, "arguments": arguments}


def test_prompts_that_are_too_long_are_counted_once(tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, positions=16))
    long, fits = "question one " * 20, "question one"
    rows = [sample((fits, " yes"), (long, " yes one")), sample((long, " no"))]
    assert cut_prompts(lm, {"t": rows}) == {"requests": 2, "of": 3, "longest": 42, "limit": 17}
    each_filter = [sample((long, {"max_gen_toks": 6}), kind=kind) for kind in ("strict", "loose")]
    assert cut_prompts(lm, {"t": each_filter}) == {"requests": 1, "of": 1, "longest": 40, "limit": 10}
    assert cut_prompts(lm, {"t": [sample((fits, " yes")), sample((long,))]}) is None
    at_the_limit = "question " * 16
    assert cut_prompts(lm, {"t": [sample((at_the_limit, " yes"))]}) is None
    assert cut_prompts(lm, {"t": [sample((at_the_limit, " yes one"))]}) is not None


def test_an_answer_longer_than_the_context_is_said_in_words(tmp_path: Path) -> None:
    lm = asked(chain.model(tmp_path, positions=4))
    with pytest.raises(ValueError, match="an answer of 5 tokens is longer than the 4 tokens that the model reads"):
        choices(lm, (" yes one yes one yes",))


def test_an_answer_without_a_token_of_its_own_is_said_in_words(plain: Any) -> None:
    with pytest.raises(ValueError, match="adds no token to its question"):
        choices(plain, (" ",))


# -- the whole way -------------------------------------------------------------------------------------------------

SOURCE = "dataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\ndoc_to_text: '{{q}}'\n"
CHOOSE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {until: [question], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TASKS = (SuiteTask("choose"), SuiteTask("write", "exact_match"))


def suite(folder: Path) -> Suite:
    """Thirty questions, of which ten have prompts of 50 words."""
    folder.mkdir()
    said = {
        "one": "yes one yes one yes one",
        "two": "no two no two no two",
        "three": "true three true three true three",
    }
    questions = [
        {
            "q": "question " * (48 if row % 3 == 2 else 1) + word,
            "choices": ["yes", "no", "true"],
            "gold": row % 3,
            "said": said[word],
        }
        for row in range(30)
        for word in [("one", "two", "three")[row % 3]]
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    source = SOURCE.replace("DATA", str(folder / "data.jsonl"))
    for task, kind in zip(TASKS, (CHOOSE, WRITE), strict=True):
        (folder / f"{task.name}.yaml").write_text(f"task: {task.name}\n{source}{kind}")
    files = [folder / f"{task.name}.yaml" for task in TASKS]
    return Suite("chains", 1, tuple(replace(task, file=file) for task, file in zip(TASKS, files, strict=True)))


@pytest.mark.slow
def test_equal_weights_get_no_verdict_whatever_stands_beside_them(tmp_path: Path) -> None:
    questions, cache = suite(tmp_path / "tasks"), tmp_path / "cache"
    plain = chain.model(tmp_path / "plain", positions=32)
    other = chain.model(
        tmp_path / "other",
        positions=32,
        tie=True,
        template="$A </s>",
        generation={"repetition_penalty": 5.0, "max_new_tokens": 2, "eos_token_id": 2},
    )
    found = {
        model.name: tiny_harness.evaluate(
            model,
            questions,
            cache=cache,
            scratch=tmp_path / "scratch",
            timeout_s=240,
            batch_size="4",
            environment={"OMP_NUM_THREADS": "1"},
        )
        for model in (plain, other)
    }
    for evaluation in found.values():
        assert [score.value for score in evaluation.scores] == [1.0, 1.0]
        assert evaluation.cut == (Cut("choose", 30, 90, 50, 33), Cut("write", 10, 30, 49, 26))
    verdict = comparison.compare(found["plain"], {"other": found["other"]}, cache=cache)
    assert {each.outcome for task in verdict.tasks for each in task.differences} == {Outcome.NOT_SHOWN}
    assert len(verdict.tasks) == 2 and verdict.left_out == verdict.not_alike == ()
    said = " ".join(remarks(found))
    for words in (
        "plain and other: 30 of 90 prompts of choose were cut",
        "repetition_penalty=5.0",
        "lm_head.weight",
        "</s>",
    ):
        assert words in said
