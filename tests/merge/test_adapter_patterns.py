"""Patterns of an adapter's config mean what PEFT makes of them, and cost linear time."""

from __future__ import annotations

import re
import time

import pytest

from bot.merge.checkpoints.patterns import BadPattern, Patterns

NAMES = (
    "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.down_proj",
    "model.layers.1.mlp.experts.12.w1", "model.layers.1.mlp.experts.1.w12", "lm_head", "h.0.attn.c_attn",
    "model.vision_tower.encoder.layers.0.q_proj", "layers_1.q_proj", "model.LAYERS.0.q_proj", "x-y.q_proj",
)  # fmt: skip
READ = (
    "q_proj", "^q_proj", "^model.layers.0.self_attn.q_proj", "layers.1.q_proj", "proj", ".*proj", r".*\.q_proj",
    r"layers\.[01]\..*", r"layers\.\d{1,2}\.mlp\.down_proj", r"layers\.\d{2}\..*", r"(q|k|v)_proj",
    r"model\.layers\.(?:0|11)\..*_proj", r"experts\.1\d?\.w1{1,2}", r"experts\.\d+\.w\d+?", r"(?i:layers)\.0\.q_proj",
    r"[^.]+\.q_proj", r"\w+_\w+", r"lm_head$", r"^lm_head$", "a|q_proj", "(?P<kind>q|k)_proj", r"\bq_proj\b",
    r"[a-z\-]+\.q_proj", "q_proj|", r"\x71_proj",
)  # fmt: skip
REFUSED = {
    r"(?!.*vision).*q_proj": "looks ahead", r".*(?<!vision)\.q_proj": "looks ahead", r"(q)\2": "back-reference",
    r"(?P<a>q)(?P=a)": "RE2 cannot read", r"[[:alpha:]]": "bracket inside", "q{,2}_proj": "lower bound",
    "(q_proj": "RE2 cannot read", r"q_proj\Z": "RE2 cannot read", "q\u00e9": "ASCII", "(?i)q_proj": "valid",
    "q{5000}": "RE2 cannot read", "x" * 3000: "longer",
}  # fmt: skip


@pytest.mark.parametrize("pattern", READ)
def test_a_pattern_matches_the_names_that_it_matches_in_peft(pattern: str) -> None:
    found = [Patterns({pattern: 1.0}).value(name) == 1.0 for name in NAMES]
    assert found == [re.match(rf"(.*\.)?({pattern})$", name) is not None for name in NAMES]


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_cannot_be_matched_in_linear_time_is_refused_with_its_reason(pattern: str) -> None:
    with pytest.raises(BadPattern, match=REFUSED[pattern]):
        Patterns({pattern: 1.0})


def test_the_first_pattern_that_matches_decides() -> None:
    patterns = Patterns({"0.self_attn.q_proj": 1.0, r".*q_pro.": 2.0, "q_proj": 3.0, "lm_head": 4.0})
    assert [patterns.value(name) for name in NAMES[:3]] == [2.0, 1.0, 2.0]
    assert patterns.value("lm_head") == 4.0
    assert patterns.value("v_proj") is None


def test_hostile_patterns_are_matched_or_refused_in_little_time() -> None:
    started = time.process_time()
    assert Patterns({"((a*)*)*b": 1.0, "(.*)(.*)(.*)(.*)(.*)x": 1.0}).value("a" * 500) is None
    patterns = Patterns({f"{'(a|b|[a-z_.0-9]*)*' * 90}{i}": 1.0 for i in range(40)})
    with pytest.raises(BadPattern, match="too many"):
        for i in range(100_000):
            patterns.value(f"model.layers.{i}.self_attn.q_proj")
    assert time.process_time() - started < 20


def test_more_expressions_than_the_limit_are_refused() -> None:
    with pytest.raises(BadPattern, match="257 expressions"):
        Patterns({f"(q|k){i}": 1.0 for i in range(257)})
    assert Patterns({f"layers.{i}.q_proj": float(i) for i in range(4000)}).value("m.layers.3999.q_proj") == 3999
