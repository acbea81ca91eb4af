"""Sanity check before the benchmark: finite logits, perplexity, coherent text, tokenizer round trip.

It takes a minute on a small model: one plain text is predicted, a few beginnings are continued greedily, a few texts go
through the tokenizer and back. An encoder-decoder reads the first half of a text and predicts the second.
`require_sound` refuses a merge that fails, in comparison with its parents if they were checked too: a small model may
repeat itself, and a tokenizer may lose spaces by design.

`texts/held.txt` was written for this purpose and is part of no dataset: prose, dialogue, instructions, minutes, code
and four more languages, about 600 words.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError
from bot.storage import write_atomic
from evaluators import memory
from evaluators.figures import number
from evaluators.prompt_tokens import prompt_tokens
from evaluators.repetition import distinct_4grams, ends_in_a_loop, loops

VERSION = 3
HELD_TEXT = Path(__file__).parent / "texts" / "held.txt"
PROMPTS = (
    "The train was late again, so Anna",
    "To bake a simple bread you need",
    "Question: Which animal gives milk, and what can be made of it?\nAnswer:",
    "Once the two of them had reached the top of the hill,",
)
ROUND_TRIPS = (
    "Two plain sentences. With a question?",
    "  spaces at both ends, a tab\there\nand a new line ",
    "Größe, œuvre, mañana, Łódź, İstanbul",
    "数学 математика गणित الرياضيات",
    "1,234.50 € ≈ ½ × 2469 🙂👍🏽",
    "def f(x):\n    return {'a': [x ** 2, -1]}\n",
)
NEW_TOKENS = 32
WINDOW = 512
ADDED_TOKENS = 16

# Factor over the bits of the worst parent: 3 nats per token become 6, a perplexity of 20 becomes 400.
MORE_BITS = 2.0
# Share of 4-grams that differ: 32 tokens that circle through five have 0.17.
LOOPING, LOOPING_ALONE = 0.2, 0.1
FEWER = 0.5


@dataclass(frozen=True, slots=True)
class SanityCheck:
    """Results of a check. With a NaN or infinite logit, `bits_per_byte` and `perplexity` (per token) are None.

    An encoder-decoder has no `perplexity`, since it may never have been trained on plain text. `missing_rows` are token
    ids without an embedding; with any, nothing is run. `distinct` is the mean share of different 4-grams in the
    continuations. `broken` counts those that are empty, one repeated character, or hold control or replacement
    characters; `looping` those that loop from the start or at their end (None in older results). `survived` of `texts`
    and added tokens came back from the tokenizer unchanged.
    """

    finite: bool
    bits_per_byte: float | None
    perplexity: float | None
    vocabulary: int
    missing_rows: int
    continuations: int
    distinct: float | None
    broken: int
    texts: int
    survived: int
    tokens_per_s: float | None
    device: str
    dtype: str
    looping: int | None = None
    encoder_decoder: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SanityCheck:
        """The inverse of `as_dict`; raises TypeError for anything else."""
        return cls(**values)


# -- check -------------------------------------------------------------------------------------------------------


def of_folder(
    model: Path, *, cache: Path, device: str = "cpu", dtype: str = "auto", model_identity: str | None = None
) -> SanityCheck:
    """Load the checkpoint in folder `model` and check it, or return the stored result.

    It reads untrusted weights: call it in a process without secrets that may be killed. Raises EvaluationError
    MODEL_UNLOADABLE.
    """
    from evaluators import harness
    from evaluators.harness import model_loading

    identity = model_identity or harness.content_digest(model)
    known = stored(cache, identity, device=device, dtype=dtype)
    if known is not None:
        return known
    result = examine(*model_loading.load(model, device, dtype))
    model_loading.free_memory()
    file = _file(cache, identity, device, dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(result.as_dict()).encode())
    return result


def stored(cache: Path, identity: str, *, device: str = "cpu", dtype: str = "auto") -> SanityCheck | None:
    """Stored result for the model `identity` (a commit, a manifest or a content digest)."""
    try:
        return SanityCheck.from_dict(json.loads(_file(cache, identity, device, dtype).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _file(cache: Path, identity: str, device: str, dtype: str) -> Path:
    text, here = hashlib.sha256(HELD_TEXT.read_bytes()).hexdigest(), memory.computed_on(device)
    key_text = json.dumps([VERSION, text, identity, here, dtype])
    return cache / "vitals" / f"{hashlib.sha256(key_text.encode()).hexdigest()}.json"


def examine(model: Any, tokenizer: Any, *, text: str | None = None, budget_s: float = 120.0) -> SanityCheck:
    """Check a loaded language model (eval mode), causal or encoder-decoder, and its tokenizer.

    `text` replaces the held text. After `budget_s` no further continuation begins, except the first.
    """
    import torch

    started = time.monotonic()
    text = HELD_TEXT.read_text(encoding="utf-8") if text is None else text
    rows = model.get_input_embeddings().weight.shape[0]
    seq2seq = bool(model.config.is_encoder_decoder)
    encode, predict = (_whole_text, _second_halves) if seq2seq else (prompt_tokens, _next_tokens)
    ids, prompts = encode(tokenizer, text), [encode(tokenizer, prompt) for prompt in PROMPTS]
    missing_rows = len({each for found in (ids, *prompts) for each in found if not 0 <= each < rows})
    texts, survived = _round_trips(tokenizer)
    finite, nats, scored, outputs, seconds = True, 0.0, 0, list[list[int]](), 0.0
    if not missing_rows:
        with torch.inference_mode():
            finite, nats, scored = _loss(predict(model, ids))
            if finite:
                outputs, seconds = _continuations(model, prompts, started + budget_s)
    written = sum(len(output) for output in outputs)
    measured = finite and scored > 0
    return SanityCheck(
        finite=finite,
        bits_per_byte=nats / math.log(2) / (len(text.encode()) * scored / (len(ids) - 1)) if measured else None,
        perplexity=math.exp(min(nats / scored, 700.0)) if measured and not seq2seq else None,
        vocabulary=int(rows),
        missing_rows=missing_rows,
        continuations=len(outputs),
        distinct=_distinct(outputs),
        broken=sum(is_broken(tokenizer.decode(output, skip_special_tokens=not seq2seq)) for output in outputs),
        texts=texts,
        survived=survived,
        tokens_per_s=written / seconds if seconds > 0 and written else None,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        looping=sum(loops(output) or ends_in_a_loop(output) for output in outputs),
        encoder_decoder=seq2seq,
    )


def _whole_text(tokenizer: Any, text: str) -> list[int]:
    """The token ids of `text` with the end token that an encoder expects."""
    return [int(each) for each in tokenizer(text, verbose=False)["input_ids"]]


def _loss(predicted: Iterator[tuple[Any, Any]]) -> tuple[bool, float, int]:
    """(every logit is a number, sum of -log p of the tokens in nats, number of tokens) of logits [n, V] and ids [n]."""
    import torch

    nats, scored = 0.0, 0
    for logits, wanted in predicted:
        # a masked entry of the vocabulary is minus infinity by design
        if bool((logits.isnan() | (logits == math.inf)).any()):
            return False, 0.0, 0
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        scored += len(wanted)
    return math.isfinite(nats), nats, scored


def _next_tokens(model: Any, ids: list[int]) -> Iterator[tuple[Any, Any]]:
    """Logits and the tokens they predict, each token but the first once: windows overlap by one token."""
    import torch

    window = min(WINDOW, _context(model) or WINDOW)
    for start in range(0, len(ids) - 1, window - 1):
        some = torch.tensor([ids[start : start + window]], device=model.device)
        yield model(input_ids=some, use_cache=False).logits[0, :-1].float(), some[0, 1:]


def _second_halves(model: Any, ids: list[int]) -> Iterator[tuple[Any, Any]]:
    """As `_next_tokens`, for an encoder-decoder that reads the first half of each window and predicts the second."""
    import torch

    for start in range(0, len(ids) - 1, WINDOW):
        read, wanted = torch.tensor([ids[start : start + WINDOW]], device=model.device).tensor_split(2, dim=1)
        yield model(input_ids=read, labels=wanted, use_cache=False).logits[0].float(), wanted[0]


def _context(model: Any) -> int | None:
    """Number of positions of the model; None if its config has none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _continuations(model: Any, prompts: Sequence[list[int]], deadline: float) -> tuple[list[list[int]], float]:
    """The continuations that the deadline allows, the first one in any case, and the seconds they took."""
    outputs, began = list[list[int]](), time.monotonic()
    for prompt in filter(None, prompts):
        if not outputs or time.monotonic() < deadline:
            outputs.append(_continued(model, prompt))
    return outputs, time.monotonic() - began


def _continued(model: Any, prompt: list[int]) -> list[int]:
    """The greedy continuation of at most NEW_TOKENS tokens within the context, without the one that ends it."""
    import torch

    ends = model.config.get_text_config(decoder=True).eos_token_id
    stops = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    output: list[int] = []
    context = _context(model) or len(prompt) + NEW_TOKENS
    fed, cache, read = prompt, None, {}
    if model.config.is_encoder_decoder:
        read = {"encoder_outputs": model.get_encoder()(input_ids=torch.tensor([prompt], device=model.device))}
        prompt = fed = [model.generation_config.decoder_start_token_id or 0]
    else:
        prompt = fed = prompt[-max(1, context - NEW_TOKENS) :]
    name = "decoder_input_ids" if read else "input_ids"
    while len(output) < min(NEW_TOKENS, context + 1 - len(prompt)):
        given = {name: torch.tensor([fed], device=model.device), **read}
        found = model(**given, past_key_values=cache, use_cache=True)
        following = int(found.logits[0, -1].argmax())
        if following in stops:
            break
        output.append(following)
        cache = getattr(found, "past_key_values", None)
        fed = [following] if cache is not None else prompt + output
    return output


def _distinct(outputs: Sequence[Sequence[int]]) -> float | None:
    return sum(map(distinct_4grams, outputs)) / len(outputs) if outputs else None


def is_broken(text: str) -> bool:
    """Return whether a text is empty, one repeated character, or has control or replacement characters.

    A replacement character at the end is a cut character and does not count.
    """
    shown = text.rstrip("\ufffd").strip()
    if not shown or "\ufffd" in shown:
        return True
    if any(unicodedata.category(each) == "Cc" and each not in "\n\t\r" for each in shown):
        return True
    longest = max(len(run.group()) for run in re.finditer(r"(.)\1*", shown, re.DOTALL))
    return longest >= 16 and 2 * longest >= len(shown)


def _round_trips(tokenizer: Any) -> tuple[int, int]:
    """Numbers of texts and added tokens that went through the tokenizer, and that came back unchanged."""
    survived = 0
    for text in ROUND_TRIPS:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        survived += tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])[:ADDED_TOKENS]
    for token, row in added:
        ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        survived += list(ids) == [row] and tokenizer.decode(ids).strip() == token.strip()
    return len(ROUND_TRIPS) + len(added), survived


# -- verdict -----------------------------------------------------------------------------------------------------


def require_sound(merge: SanityCheck, parents: Sequence[SanityCheck] = ()) -> None:
    """Refuse a merge that fails the check, in comparison with its parents if they are known.

    Raises EvaluationError NOT_FINITE (a logit is NaN or infinite), MODEL_UNLOADABLE (token ids without an embedding)
    and MODEL_NONSENSE: more than twice the bits per byte of its worst parent (alone: no better than a blind guess in
    its vocabulary); looping continuations with under a fifth of different 4-grams and under half of its parents'
    (alone: under a tenth); more than half of them broken while no parent's are; or a tokenizer that returns under half
    of the texts that each parent's returns.
    """
    if merge.missing_rows:
        raise EvaluationError(
            "MODEL_UNLOADABLE",
            f"{merge.missing_rows} token ids lie beyond the {merge.vocabulary} rows of the model's embedding.",
            "Check that config.json, the safetensors files and the tokenizer belong together.",
        )
    if not merge.finite:
        raise EvaluationError(
            "NOT_FINITE",
            "The model's logits for a plain text are not finite (NaN or infinity).",
            "Look for NaN or overflow in its weights.",
        )
    fault = _fault(merge, [parent for parent in parents if parent.finite and not parent.missing_rows])
    if fault:
        raise EvaluationError(
            "MODEL_NONSENSE",
            f"The model fails the sanity check: {fault}.",
            "Merge with smaller weights or another method. No task was run.",
        )


def _fault(merge: SanityCheck, parents: Sequence[SanityCheck]) -> str | None:
    """The fault as a clause; None without one. An encoder-decoder is checked only in comparison with its parents."""
    if merge.encoder_decoder and not parents:
        return None
    bits = [parent.bits_per_byte for parent in parents if parent.bits_per_byte is not None]
    if merge.bits_per_byte is not None:
        if bits and merge.bits_per_byte > MORE_BITS * max(bits):
            needs = f"it needs {merge.bits_per_byte:.2f} bits per byte for a plain text"
            return f"{needs}, its worst parent {max(bits):.2f}"
        if not bits and merge.perplexity is not None and merge.perplexity >= merge.vocabulary:
            return f"its perplexity on a plain text is {number(merge.perplexity)}, a blind guess has {merge.vocabulary}"
    distinct = [parent.distinct for parent in parents if parent.distinct is not None]
    limit = min(LOOPING, FEWER * min(distinct)) if distinct else LOOPING_ALONE
    if merge.distinct is not None and merge.distinct < limit:
        return f"its continuations repeat themselves, and only {merge.distinct:.0%} of their 4-grams differ"
    if merge.continuations < 2 * merge.broken and all(each.continuations >= 2 * each.broken for each in parents):
        return f"{merge.broken} of {merge.continuations} continuations are empty, one character or control characters"
    shares = [parent.survived / parent.texts for parent in parents]
    if shares and merge.survived / merge.texts < FEWER * min(shares):
        return f"its tokenizer returns {merge.survived} of {merge.texts} texts unchanged"
    return None


COLUMNS = ("perplexity (bits per byte)", "4-grams that differ", "texts it writes", "tokenizer", "tokens/s")


def cells(vitals: SanityCheck) -> tuple[str, ...]:
    """Cells under COLUMNS; a dash for values that were not measured."""
    absent = "\N{EN DASH}"
    loop = "" if vitals.looping is None else f", {vitals.looping} looping"
    bits, at = vitals.bits_per_byte, f"{vitals.device}, {vitals.dtype}"
    perplexity = absent if vitals.perplexity is None else number(vitals.perplexity)
    return (
        absent if bits is None else f"{perplexity} ({bits:.2f})",
        absent if vitals.distinct is None else f"{vitals.distinct:.0%}",
        f"{vitals.broken} broken{loop} of {vitals.continuations}",
        f"{vitals.survived} of {vitals.texts} unchanged",
        absent if vitals.tokens_per_s is None else f"{vitals.tokens_per_s:.1f} ({at})",
    )
