"""Evaluation settings and the cache key derived from them.

The key of a stored evaluation covers the model's content, the suite's digest, every setting and the versions of the
libraries that compute, so equal keys mean equal numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path

from bot.errors import EvaluationError
from evaluators.content import content_digest
from evaluators.harness.suites import Suite
from evaluators.memory import computed_on

LIBRARIES = ("lm_eval", "transformers", "torch")
_BESIDE = ("tokenizers", "datasets")  # a change of theirs can change a number, too
BACKENDS = ("hf", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The same for every model and every evaluation. In bfloat16, logarithms of close answers would be equal.
SOFTMAX_DTYPE = "float32"
GENERATION = "neutral"  # without the settings of the model's generation_config.json
_RULES = 6  # goes up when models are asked in another way, so that older results are not taken for new ones


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Settings of an evaluation.

    `limit` is the number of samples per task. `seed` 0 draws as lm-eval's own command line does. `device` "auto" takes
    a GPU if there is one. `dtype` "auto" is float32 on a CPU and the checkpoint's own elsewhere. `batch_size` is a
    number, or "auto" for the largest that fits, halved when memory runs out. `backend` is hf (transformers) or vllm.
    """

    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: str = "16"
    chat_template: bool = False
    backend: str = "hf"

    def check(self) -> None:
        """Raises EvaluationError VALUE_OUT_OF_RANGE for an impossible value."""
        for name, value, allowed, advice in (
            (
                "device",
                self.device,
                re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", self.device),
                "auto, cpu, cuda or cuda:N",
            ),
            ("dtype", self.dtype, self.dtype in DTYPES, ", ".join(DTYPES)),
            ("backend", self.backend, self.backend in BACKENDS, " or ".join(BACKENDS)),
            ("seed", str(self.seed), 0 <= self.seed < 1 << 31, "a number from 0 to 2147483647"),
            ("batch size", self.batch_size, re.fullmatch(r"auto|[1-9]\d{0,4}", self.batch_size), "a number, or auto"),
        ):
            if not allowed:
                raise EvaluationError(
                    "VALUE_OUT_OF_RANGE", f"The {name} {value[:40]!r} is not possible.", f"Write {advice}."
                )

    def key(self, identity: str, suite_digest: str) -> str:
        """64 hex: the name of the evaluation of the model `identity` (a commit, a manifest or a content digest)."""
        libraries = (*LIBRARIES, *_BESIDE, *(("vllm",) if self.backend == "vllm" else ()))
        versions = [_version(name) for name in libraries]
        device = computed_on(self.device)
        asked = [self.limit, self.seed, device, self.dtype, self.batch_size, self.chat_template, self.backend]
        return hashlib.sha256(json.dumps([_RULES, identity, suite_digest, *asked, *versions]).encode()).hexdigest()

    def fits(self, device: str, dtype: str) -> bool:
        """Return whether a result computed on `device` in `dtype` equals one computed under these settings here."""
        here = computed_on(self.device)
        expected = "float32" if self.dtype == "auto" and here == "cpu" else self.dtype
        return device.partition(":")[0] == here.partition(":")[0] and expected in ("auto", dtype)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Question:
    """A suite and the settings under which all models of a comparison are evaluated."""

    suite: Suite
    conditions: EvalConfig

    def key(self, identity: str) -> str:
        """Names the stored evaluation of the model `identity`."""
        return self.conditions.key(identity, self.suite.digest)


def key_of(model: Path, suite: Suite, conditions: EvalConfig, identity: str | None = None) -> str:
    """The key of one evaluation; `identity` spares hashing the weights. Raises MODEL_UNLOADABLE."""
    return conditions.key(identity or content_digest(model), suite.digest)
