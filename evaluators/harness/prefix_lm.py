"""lm-eval's transformers backend with shared prefixes: a prefix of several requests is read once.

Few-shot prompts repeat their examples for every question, and multiple-choice questions repeat their prompt for every
answer. Requests are planned as a prefix tree (prefix_tree.py) and read in packed passes (packed_pass.py); logits are
computed only for tokens that are scored. Greedy answers grow in a packed row, too (prefix_generation.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers.cache_utils import DynamicCache

from evaluators.harness import packed_pass
from evaluators.harness.neutral_lm import NeutralLM
from evaluators.harness.packed_pass import forked, read
from evaluators.harness.prefix_generation import PackedDecoder
from evaluators.harness.prefix_tree import Chunk, PackedTokens, PrefixTree, Segment
from evaluators.harness.scores import WHOLE

TOKENS_PER_REQUEST = 32  # tokens of one pass per request of the batch size
MOST_TOKENS = 4096  # of one pass: its mask has the square of this number of elements
# Answers are generated in packed rows if the prompts share so much: each answer attends over all slots of the row.
LEAST_SHARED = 0.5

T = TypeVar("T")


class PrefixLM(NeutralLM):
    """A `NeutralLM` that reads a prefix of several requests once.

    `unshared` is the reason why this model reads each request whole instead, None if it shares prefixes. Requests of
    more than `longest` tokens are always read whole. `answered` holds the indices of requests to skip, so that the rest
    of an interrupted evaluation is read in the same passes; their answers are meaningless.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.unshared = packed_pass.reason_against(model)
        self.longest = packed_pass.longest(model)
        self.answered: set[int] = set()
        limit = "" if math.isinf(self.longest) else f" in requests of at most {self.longest} tokens"
        self.reading = WHOLE if self.unshared else f"shared prefixes once{limit}"

    def batch_ended(self) -> None:
        """Called when all answers of a pass, or of a group of generated answers, are complete."""

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        rows = [(*context, *answer)[-(self.max_length + 1) :][:-1] for _, context, answer in requests]
        windows = any(text is None for text, _, _ in requests)  # of a text that is scored whole: they share nothing
        if self.unshared or windows or max(map(len, rows), default=0) > self.longest:
            return self._unanswered(requests, partial(super()._loglikelihood_tokens, **options))
        self._require_answers(requests)
        scoring = _Scoring(self, requests, rows)
        scoring.run(scoring.tree.plan(self._pass_tokens()))
        return scoring.answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._require_end()
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        skipped, out = self.answered, [""] * len(requests)
        for members in groups.values():
            self.answered = {place for place, i in enumerate(members) if i in skipped}
            texts = self._generated([requests[i] for i in members])
            for i, text in zip(members, texts, strict=True):
                out[i] = text
        self.answered = skipped
        return out

    def _generated(self, requests: list[Any]) -> list[str]:
        """Answers to requests with equal generation settings."""
        settings = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        until = settings.pop("until", None)
        most = settings.pop("max_gen_toks")
        room = self.max_length - most
        greedy = settings == {"do_sample": False, "temperature": 0.0} and self.think_end_token is None
        if self.unshared or not greedy or room <= 0 or self.device.type != "cpu":
            return self._unanswered(requests, partial(super().generate_until, disable_tqdm=True))
        prompts = [self._prompt(request.args[0], room) for request in requests]
        tree = PrefixTree(prompts)
        passes = tree.plan(self._pass_tokens())
        shared = 1 - tree.tokens_read(passes) / sum(map(len, prompts))
        if shared < LEAST_SHARED or max(map(len, prompts)) + most > self.longest:
            return self._unanswered(requests, partial(super().generate_until, disable_tqdm=True))
        stops = handle_stop_sequences(until, self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        return self._decoded(requests, prompts, tree, passes, stops, most)

    def _decoded(
        self,
        requests: list[Any],
        prompts: Sequence[tuple[int, ...]],
        tree: PrefixTree,
        passes: Sequence[Segment | Chunk],
        stops: Sequence[str],
        most: int,
    ) -> list[str]:
        of_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            of_prompt[prompt].append(i)
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        out = [""] * len(requests)

        def finished(tokens: Sequence[int]) -> bool:
            if tokens[-1] in ends or len(tokens) >= most:
                return True
            text = self.tok_decode(tokens)
            return any(stop and stop in text for stop in stops)

        def done(answers: Iterable[tuple[int, Sequence[int]]]) -> None:
            for number, tokens in answers:
                text = postprocess_generated_text(self.tok_decode(tokens), list(stops), None)
                for i in of_prompt[tree.sequences[number]]:
                    out[i] = text
                    if i not in self.answered:
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
            self.batch_ended()

        def skipped(number: int) -> bool:
            return all(i in self.answered for i in of_prompt[tree.sequences[number]])

        decoder = PackedDecoder(self.model, tree, self.batch_size_per_gpu, finished, done, skipped)
        decoder.run(passes)
        return out

    def _prompt(self, text: str, room: int) -> tuple[int, ...]:
        ids, _ = self.tok_batch_encode([text], left_truncate_len=room, truncation=self.truncation)
        return tuple(ids[0].tolist())

    def _pass_tokens(self) -> int:
        return min(MOST_TOKENS, TOKENS_PER_REQUEST * int(self.batch_size_per_gpu))

    def _unanswered(self, requests: Sequence[Any], run: Callable[[list[Any]], list[T]]) -> list[T]:
        """Run lm-eval's own way on the requests that are not in `answered`."""
        places = [i for i in range(len(requests)) if i not in self.answered]
        out: list[Any] = [None] * len(requests)
        for i, answer in zip(places, run([requests[i] for i in places]) if places else [], strict=True):
            out[i] = answer
        return out


class _Scoring:
    """Log-probabilities of the answers of all requests, over one prefix tree."""

    def __init__(self, lm: PrefixLM, requests: Sequence[Any], rows: Sequence[tuple[int, ...]]) -> None:
        self._lm, self._requests = lm, requests
        self.tree = PrefixTree(rows)
        number = {row: i for i, row in enumerate(self.tree.sequences)}
        self._of_sequence: dict[int, list[int]] = defaultdict(list)  # requests by sequence
        for i, row in enumerate(rows):
            self._of_sequence[number[row]].append(i)
        self._scores: list[dict[int, tuple[float, bool]]] = [{} for _ in requests]  # by position
        self.answers = [(0.0, False)] * len(requests)

    def run(self, passes: Iterable[Segment | Chunk], cache: DynamicCache | None = None) -> None:
        for each in passes:
            wanted = [i for number in range(each.first, each.stop) for i in self._of_sequence[number]]
            if all(i in self._lm.answered for i in wanted):
                continue
            inner = None if cache is None and isinstance(each, Chunk) else forked(cache)
            self._score(self.tree.pack(each), each, inner)
            if isinstance(each, Segment):
                self.run(each.passes, inner)
                continue
            for i in wanted:
                self._finish(i)
            self._lm.batch_ended()

    def _score(self, packed: PackedTokens, part: Segment | Chunk, cache: DynamicCache | None) -> None:
        """One pass, and the scores of the answers' tokens that its logits predict."""
        wanted: list[tuple[int, int, int, int]] = []  # slot, request, position, predicted token
        for number, slots in enumerate(packed.slots, part.first):
            length = len(self.tree.sequences[number])
            for i in self._of_sequence[number]:
                answer = self._requests[i][2]
                first = length - len(answer)
                read_here = range(max(first, part.start), min(length, part.start + len(slots)))
                wanted += [(slots[p - part.start], i, p, answer[p - first]) for p in read_here]
        kept = sorted({slot for slot, *_ in wanted}) or [len(packed.ids) - 1]
        logits = read(self._lm.model, packed.ids, packed.positions, packed.mask, cache, kept)
        if not wanted:
            return
        rows = {slot: row for row, slot in enumerate(kept)}
        at = torch.tensor([rows[slot] for slot, *_ in wanted], device=logits.device)
        tokens = torch.tensor([token for *_, token in wanted], device=logits.device)
        norms = torch.cat([torch.logsumexp(part.float(), -1) for part in torch.split(logits, 64)])
        values = (logits[at, tokens].float() - norms[at]).tolist()
        greedy = (logits.argmax(-1)[at] == tokens).tolist()
        for (_, i, position, _), value, is_greedy in zip(wanted, values, greedy, strict=True):
            self._scores[i][position] = value, is_greedy

    def _finish(self, i: int) -> None:
        if i in self._lm.answered:
            return
        scores = self._scores[i]
        values = torch.tensor([scores[position][0] for position in sorted(scores)])
        self.answers[i] = float(values.sum()), all(is_greedy for _, is_greedy in scores.values())
        self._lm.cache_hook.add_partial("loglikelihood", self._requests[i][0], self.answers[i])
