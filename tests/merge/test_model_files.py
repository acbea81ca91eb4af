"""Files that are copied beside the weights, and the chat templates of untrusted requests that are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from test_vocabulary import LINEAR, SHARED, model
from tiny_checkpoints import merge, plan_of
from transformers import utils
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from bot.hub.files import ALLOWED
from bot.merge.checkpoints.header import UNTRUSTED
from bot.merge.checkpoints.model_files import OTHER_FILES, TOKENIZER_FILES
from bot.merge.planning.plan import Plan
from bot.merge.tokenizer.named_templates import TEMPLATES
from bot.merge.tokenizer.template_files import is_known

ODD, KNOWN = "{{ messages }}", TEMPLATES["chatml"]


def test_the_vocabulary_files_of_every_tokenizer_of_transformers_are_listed() -> None:
    listed = (names if isinstance(names, tuple) else (names,) for names in TOKENIZER_MAPPING_NAMES.values())
    classes = {getattr(transformers, name, object) for names in listed for name in names if name}
    # read from the classes' own dictionaries: those whose library is not installed raise on every other access
    tables = (vars(part).get("vocab_files_names") or {} for one in classes for part in one.__mro__)
    files = {file for table in tables for file in table.values()}
    assert len(files) > 15
    assert files - set(TOKENIZER_FILES) == set()
    kept = {utils.FEATURE_EXTRACTOR_NAME, utils.IMAGE_PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.PROCESSOR_NAME}
    assert kept | {utils.AUDIO_TOKENIZER_NAME, utils.GENERATION_CONFIG_NAME} == set(OTHER_FILES)


def test_a_download_takes_every_file_that_a_merge_copies() -> None:
    assert set(TOKENIZER_FILES) | set(OTHER_FILES) <= set(ALLOWED)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate("ax"):
        model(tmp_path / name, seed, SHARED)
    return tmp_path


def put(folder: Path, file: str, value: Any) -> None:
    """Write a template file, or a template under `chat_template` into a JSON file with other settings."""
    if file.endswith(".jinja"):
        (folder / file).write_text(value)
        return
    rest = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({"other": 1} | rest | {"chat_template": value}))


def published(models: Path, text: str = LINEAR) -> tuple[Plan, Path]:
    """The plan of a stranger's request, and the folder that it gives."""
    merge(text, models, models / "out", limits=UNTRUSTED)
    return plan_of(text, models, limits=UNTRUSTED)[0], models / "out"


HOLDERS = (
    "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


@pytest.mark.parametrize("file", HOLDERS)
def test_an_unknown_template_is_left_out_wherever_it_stands_and_a_known_one_is_kept(file: str, models: Path) -> None:
    put(models / "a", file, ODD)
    planned, out = published(models)
    assert ODD not in "".join(path.read_text() for path in out.glob("*.j*") if "merge" not in path.name)
    told = [notice.text for notice in planned.notices if notice.code == "TEMPLATE_DROPPED"]
    assert len(told) == 1 and file in told[0]
    if file.endswith(".json"):
        assert json.loads((out / file).read_text())["other"] == 1
    put(models / "a", file, KNOWN + "\n")
    planned, _ = plan_of(LINEAR, models, limits=UNTRUSTED)
    assert file in {copied.file for copied in planned.copies} and file not in planned.texts
    assert "TEMPLATE_DROPPED" not in {notice.code for notice in planned.notices}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([{"name": "default", "template": KNOWN}, {"name": "tool_use", "template": ODD}],
         [{"name": "default", "template": KNOWN}]),
        ([{"name": "default", "template": ODD}, "odd"], None),
        ({"default": ODD, "rag": KNOWN}, {"rag": KNOWN}),
        (7, None),
    ],
)  # fmt: skip
def test_of_several_templates_the_known_ones_stay(given: Any, kept: Any, models: Path) -> None:
    put(models / "a", "tokenizer_config.json", given)
    _, out = published(models)
    assert json.loads((out / "tokenizer_config.json").read_text()).get("chat_template") == kept


def test_a_file_with_nothing_but_an_unknown_template_is_left_out(models: Path) -> None:
    (models / "a" / "chat_template.json").write_text(json.dumps({"chat_template": ODD}))
    assert not (published(models)[1] / "chat_template.json").exists()


def test_auto_chooses_among_known_templates(models: Path) -> None:
    put(models / "a", "tokenizer_config.json", ODD)
    put(models / "x", "tokenizer_config.json", KNOWN)
    planned, out = published(models, LINEAR + "chat_template: auto")
    assert (out / "chat_template.jinja").read_text() == KNOWN.strip()
    assert "TEMPLATE_DROPPED" in {notice.code for notice in planned.notices}


def test_the_operators_own_merge_keeps_every_template(models: Path) -> None:
    for file in HOLDERS:
        put(models / "a", file, ODD)
    merge(LINEAR, models, models / "out")
    for file in HOLDERS:
        assert (models / "out" / file).read_bytes() == (models / "a" / file).read_bytes()


def test_templates_are_known_by_their_text_alone() -> None:
    assert all(is_known(f" {text}\n") for text in TEMPLATES.values())
    assert not any(is_known(text) for text in (ODD, KNOWN + ODD, "", None, 7, KNOWN + " " * 2**16))


def test_all_templates_of_a_folder_of_named_ones_survive(models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "a")
    tokenizer.chat_template = {"default": "{{ 'one' }}", "tool_use": "{{ 'two' }}"}
    tokenizer.save_pretrained(models / "a")
    assert (models / "a" / "additional_chat_templates" / "tool_use.jinja").exists()
    merge(LINEAR, models, models / "out")
    assert transformers.AutoTokenizer.from_pretrained(models / "out").chat_template == tokenizer.chat_template
