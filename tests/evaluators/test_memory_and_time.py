"""Before and after memory runs out: what an evaluation takes is told, and a batch that does not fit is halved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bot.errors import EvaluationError
from evaluators import memory
from evaluators.harness import Estimate, workload
from evaluators.harness.suites import Suite
from evaluators.harness.workload import Workload
from tests.evaluators import tiny_harness

SETTINGS: dict[str, Any] = {"timeout_s": 240.0, "environment": {"OMP_NUM_THREADS": "1"}}
LIMIT_BYTES = 2_400_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_harness.model(tmp_path_factory.mktemp("model") / "tiny", rows=400_000)


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batch_and_the_scores_are_the_same(model: Path, tmp_path: Path) -> None:
    suite = Suite("animals", 1, (tiny_harness.task(tmp_path / "task", "which_animal", 300),))
    where = {"cache": tmp_path / "cache", "scratch": tmp_path / "scratch"}
    told: list[Estimate] = []
    small = tiny_harness.evaluate(model, suite, batch_size="16", estimated=told.append, **where, **SETTINGS)
    large = tiny_harness.evaluate(model, suite, batch_size="512", memory_limit_bytes=LIMIT_BYTES, **where, **SETTINGS)
    assert small.smallest_batch == 16
    assert large.smallest_batch is not None and 16 <= large.smallest_batch < 512
    assert [score.value for score in large.scores] == [score.value for score in small.scores]
    assert large.environment.batch_size == "512"
    assert told[0].requests == 1500 and told[0].tokens == pytest.approx(300 * 11, rel=0.2)  # questions once
    assert told[0].seconds is not None and told[0].memory_bytes is not None
    assert told[0].memory_bytes > memory.loaded_bytes(model, "float32", "cpu")


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_weights_that_cannot_fit_are_refused_before_a_process_starts(device: str, model: Path, tmp_path: Path) -> None:
    if memory.computed_on(device) != "cpu":
        pytest.skip("there is a GPU")
    suite = Suite("animals", 1, (tiny_harness.task(tmp_path / "task", "which_animal"),))
    with pytest.raises(EvaluationError) as caught:
        tiny_harness.evaluate(
            model,
            suite,
            cache=tmp_path / "cache",
            scratch=tmp_path / "scratch",
            memory_limit_bytes=1000,
            device=device,
            **SETTINGS,
        )
    assert caught.value.code == "MEMORY_LIMIT" and "GB of memory" in caught.value.message
    assert not (tmp_path / "scratch" / "harness.log").exists()


def test_loaded_weights_are_counted_from_headers(model: Path, tmp_path: Path) -> None:
    count = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert memory.loaded_bytes(model, "auto", "cpu") == 4 * count
    assert memory.loaded_bytes(model, "bfloat16", "cpu") == 2 * count
    assert memory.loaded_bytes(model, "auto", "cuda") == 4 * count  # it is stored in float32
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert memory.loaded_bytes(tmp_path, "auto", "cpu") == 0


@pytest.mark.parametrize(
    "header",
    ["[" * 100_000, '{"a": {"shape": [2]}}', '{"a": {"dtype": [], "shape": [%s, 2]}}' % (10**400)],
    ids=["deep", "no type", "larger than any number"],
)
def test_a_strangers_header_that_lies_takes_no_memory_and_is_refused_by_whoever_loads_it(
    header: str, tmp_path: Path
) -> None:
    text = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for dtype, device in (("auto", "cpu"), ("auto", "cuda")):
        assert memory.loaded_bytes(tmp_path, dtype, device) == 0
    memory.require_memory(tmp_path, "auto", "cpu", 1000)


def test_a_model_is_laid_over_several_gpus_only_where_one_is_too_small() -> None:
    assert not memory.spreads(60, [100])
    assert not memory.spreads(1000, [100])
    assert not memory.spreads(60, [100, 100])
    assert memory.spreads(80, [100, 100])


@given(st.integers(0, 10**12), st.integers(1, 10**10))
def test_an_automatic_batch_on_a_gpu_fits_and_is_a_power_of_two(free: int, request: int) -> None:
    batch = memory.batch("auto", "cuda", free, request)
    assert batch & (batch - 1) == 0 and 1 <= batch <= memory.GPU_BATCH
    assert batch == 1 or batch * request <= free / 2
    assert memory.batch("auto", "cpu", free, request) == 16
    assert memory.batch("7", "cuda", free, request) == 7


def test_answers_of_one_token_to_one_question_are_counted_as_one_pass() -> None:
    def encode(text: str) -> list[int]:
        return [ord(char) for char in text]

    asked = [("loglikelihood", ("abc", answer)) for answer in ("x", "y", "zz")]
    assert workload._of_requests(asked, encode, shared=False) == Workload(3, 3 + 4, 0, 4)
    assert workload._of_requests(asked, encode, shared=True) == Workload(3, 4, 0, 4)
    written = [("generate_until", ("abc", {"max_gen_toks": 7})), ("generate_until", ("abc", {}))]
    assert workload._of_requests(written, encode, shared=False) == Workload(2, 8, 7 + 256, 4)
