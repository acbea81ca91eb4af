"""The task-vector family: task_arithmetic, ties, dare_*, della*, breadcrumbs*.

All compute b + lambda * combined(d_i) from the deltas d_i = x_i - b, in mergekit's order: sparsify each delta, rescale
it, multiply by its weight, elect a sign per element, sum, normalise, multiply by lambda. Methods differ in how they
sparsify and in whether they elect a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bot.merge.methods.registry import WEIGHT, Absent, Base, Finding, Parameter, flag, merge_method
from bot.merge.streaming.operation import GATHER_LIMIT, MASK_LIMIT_BYTES, Operation, row_width

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel
    from bot.merge.streaming.masks import Mask

    Masks = Callable[[Inputs], list[Mask]]

TINY_L1 = 1e-7
TINY_SUM = 1e-8  # weights with a smaller sum are not normalised

DENSITY = Parameter("density", 1.0, low=0, high=1)
EPSILON = Parameter("epsilon", 0.15, low=0, high=1)
GAMMA = Parameter("gamma", 0.01, low=0, high=1, high_open=True)


def _shared(*, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    """The shared parameters with the defaults of a method."""
    return flag("normalize", normalize), Parameter("lambda", 1.0), flag("rescale", rescale)


def _negative_weights(operation: Operation, *, elects: bool) -> Iterator[Finding]:
    """Notices about weights that `normalize` divides by a negative sum, which turns subtraction into addition.

    Without an election the sum is that of all weights; with one it is, for each element, that of the weights whose
    task vectors agree with the elected sign. mergekit does the same.
    """
    weights = [float(w) for w in operation.per_input["weight"] if w is not None]
    if not operation.shared["normalize"] or min(weights, default=0.0) >= 0:
        return
    mixed = max(weights) > 0
    if elects and mixed:
        yield Finding(
            "MIXED_SIGNS", f"weights of both signs are normalised in {operation.name}; the result may be large"
        )
    if elects or sum(weights) < 0:
        where = " wherever negative weights prevail" if elects and mixed else ""
        yield Finding(
            "NEGATIVE_WEIGHTS",
            f"`normalize` divides by a negative sum of weights{where} in {operation.name}, so what a negative weight "
            "should subtract is added; write `normalize: false` to subtract it",
        )


def _nothing_kept(operation: Operation, kept: Callable[[float], int | float]) -> Iterator[Finding]:
    """A notice if `kept` is 0 for the density of an input."""
    if any(kept(float(density)) == 0 for density in operation.per_input["density"] if density is not None):
        yield Finding("NOTHING_KEPT", f"the density is so low that nothing of a source is kept in {operation.name}")


def _check_epsilon(operation: Operation, paths: Sequence[str]) -> Iterator[Finding]:
    columns = operation.per_input["density"], operation.per_input["epsilon"]
    for path, density, epsilon in zip(paths, *columns, strict=True):
        if density is None or epsilon is None or not 0 < density < 1:
            continue
        if density - epsilon <= 0 or density + epsilon >= 1:
            yield Finding(
                "VALUE_OUT_OF_RANGE",
                f"`{path}.parameters` has density {density:g} with epsilon {epsilon:g} in {operation.name}.",
                "della needs density - epsilon above 0 and density + epsilon below 1: set a smaller `epsilon`.",
            )


def _check(operation: Operation, paths: Sequence[str], *, elects: bool) -> Iterator[Finding]:
    """Check of all methods of the family: each parameter that a method has."""
    if "epsilon" in operation.per_input:
        yield from _check_epsilon(operation, paths)
    yield from _negative_weights(operation, elects=elects)
    if "gamma" in operation.per_input:
        yield from _nothing_kept(operation, lambda density: int(density * operation.elements))
    elif "density" in operation.per_input:
        yield from _nothing_kept(operation, lambda density: density)


_CHECK, _CHECK_ELECTION = partial(_check, elects=False), partial(_check, elects=True)
_task_vector_method = partial(merge_method, base=Base.REQUIRED, inputs=(1, None))


@_task_vector_method(
    "task_arithmetic",
    per_input=(WEIGHT, Parameter("density", Absent.NONE, used=False)),
    shared=(flag("normalize", False), Parameter("lambda", 1.0), flag("rescale", False, used=False)),
    reference="arXiv:2212.04089",
    check=_CHECK,
)
def task_arithmetic(inputs: Inputs) -> Kernel:
    """b + lambda * sum(w_i d_i), the sum divided by sum(w_i) with `normalize`."""
    from bot.merge.streaming.sums import add_to_base, total

    weight, lambda_ = inputs.values("weight"), inputs.number("lambda")
    divisor = _divisor(weight, inputs.flag("normalize"))

    def kernel(chunk: Chunk) -> Tensor:
        votes = [delta.mul_(w) for delta, w in zip(chunk.deltas(), weight, strict=True)]
        return add_to_base(total(votes), divisor, lambda_, chunk.b)

    return kernel


def _divisor(weight: Sequence[float], normalize: bool) -> float:
    total = sum(weight)
    return total if normalize and abs(total) >= TINY_SUM else 1.0


def _combine(inputs: Inputs, masks: list[Mask], *, elects: bool) -> Kernel:
    """b + lambda * combined masked deltas."""
    from bot.merge.streaming.election import Election
    from bot.merge.streaming.sums import add_to_base, total

    weight, lambda_, normalize = inputs.values("weight"), inputs.number("lambda"), inputs.flag("normalize")
    by_count = bool(inputs.operation.shared.get("naive_count"))
    factors = weight
    if inputs.flag("rescale"):
        factors = [w * f for w, f in zip(weight, _rescales(inputs, masks), strict=True)]
    divisor = _divisor(weight, normalize)
    for mask in masks:
        mask.rewind()

    def kernel(chunk: Chunk) -> Tensor:
        deltas = zip(chunk.deltas(), masks, factors, strict=True)
        votes = [_times(mask.apply(delta, chunk.start), factor) for delta, mask, factor in deltas]
        if elects:
            return add_to_base(Election(inputs, votes, weight).mean_or_sum(normalize, by_count), 1.0, lambda_, chunk.b)
        return add_to_base(total(votes), divisor, lambda_, chunk.b)

    return kernel


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)


def _rescales(inputs: Inputs, masks: Sequence[Mask]) -> list[float]:
    """Factors that restore the L1 norm of every delta: one pass over the deltas and the masked deltas."""
    import torch

    from bot.merge.streaming.masks import Mask

    whole, rest = [0.0] * inputs.n, [0.0] * inputs.n
    if all(type(mask) is Mask for mask in masks):
        return [1.0] * inputs.n
    for chunk in inputs.chunks():
        buffer = inputs.buffer("magnitude", chunk.b)
        for i, (delta, mask) in enumerate(zip(chunk.deltas(), masks, strict=True)):
            whole[i] += float(torch.abs(delta, out=buffer).sum())
            rest[i] += float(torch.abs(mask.apply(delta, chunk.start), out=buffer).sum())
    return [1.0 if a < TINY_L1 or c < TINY_L1 else a / c for a, c in zip(whole, rest, strict=True)]


# --- ties and breadcrumbs: masks by magnitude ---


def _gathered(operation: Operation, itemsize: int, thresholds: int) -> int:
    """Bytes of the elements gathered around so many thresholds per input."""
    return thresholds * len(operation.operands) * 2 * itemsize * min(operation.elements, GATHER_LIMIT)


@_task_vector_method(
    "ties",
    per_input=(WEIGHT, DENSITY),
    shared=_shared(normalize=True, rescale=False),
    reference="arXiv:2306.01708",
    state_bytes=partial(_gathered, thresholds=1),
    check=_CHECK_ELECTION,
)
def ties(inputs: Inputs) -> Kernel:
    """Trim each delta to its largest elements, elect a sign per element, sum the deltas that agree with it.

    Keeps max(1, int(density * n)) of n elements; of equal elements the first ones. `naive_count` (the 2023 `main.py`)
    elects the sign of most deltas instead of the sign of their sum.
    """
    counts: list[tuple[int, ...]] = []
    for density in inputs.values("density"):
        kept = max(1, int(density * inputs.count)) if density > 0 else 0
        counts.append(() if density >= 1 else (kept,))
    return _combine(inputs, _by_magnitude(inputs, counts), elects=True)


@_task_vector_method(
    "breadcrumbs",
    per_input=(WEIGHT, DENSITY, GAMMA),
    shared=_shared(normalize=False, rescale=False),
    reference="arXiv:2312.06795",
    state_bytes=partial(_gathered, thresholds=2),
    check=_CHECK,
)
def breadcrumbs(inputs: Inputs) -> Kernel:
    """Drop the largest elements (outliers) and the smallest ones of each delta, then sum.

    Drops the int(gamma * n) largest of n elements, and keeps the int(density * n) largest of the rest.
    """
    return _combine(inputs, _bands(inputs), elects=False)


@_task_vector_method(
    "breadcrumbs_ties",
    per_input=(WEIGHT, DENSITY, GAMMA),
    shared=_shared(normalize=False, rescale=False),
    reference="arXiv:2312.06795",
    state_bytes=partial(_gathered, thresholds=2),
    check=_CHECK_ELECTION,
)
def breadcrumbs_ties(inputs: Inputs) -> Kernel:
    """breadcrumbs with the sign election of ties."""
    return _combine(inputs, _bands(inputs), elects=True)


def _bands(inputs: Inputs) -> list[Mask]:
    n = inputs.count
    counts: list[tuple[int, ...]] = []
    for density, gamma in zip(inputs.values("density"), inputs.values("gamma"), strict=True):
        keep = int(density * n)
        smallest = max(0, n - keep - int(gamma * n))
        counts.append(() if density >= 1 else (n - smallest - keep, n - smallest))
    return _by_magnitude(inputs, counts)


def _by_magnitude(inputs: Inputs, counts: Sequence[tuple[int, ...]]) -> list[Mask]:
    """Masks that keep everything (no count), the k largest (k,), or the outer but not the inner largest."""
    from bot.merge.streaming.masks import Band, Largest, Mask
    from bot.merge.streaming.selection import select

    out: list[Mask] = []
    for selections in select(inputs, lambda chunk: [delta.abs_() for delta in chunk.deltas()], counts):
        match selections:
            case []:
                out.append(Mask())
            case [only]:
                out.append(Largest(only, inputs.dtype))
            case [inner, outer]:
                out.append(Band(inner, outer, inputs))
    return out


# --- dare and della: random masks ---


def _drawn_state(operation: Operation, itemsize: int) -> int:
    """Bits of the masks, kept from the first pass for the second."""
    if not operation.shared["rescale"]:
        return 0
    return len(operation.operands) * min(operation.elements // 8 + 1, MASK_LIMIT_BYTES)


@_task_vector_method(
    "dare_linear",
    per_input=(WEIGHT, DENSITY),
    shared=_shared(normalize=False, rescale=True),
    reference="arXiv:2311.03099",
    draws=True,
    state_bytes=_drawn_state,
    check=_CHECK,
)
def dare_linear(inputs: Inputs) -> Kernel:
    """Drop elements of each delta at random, restore its L1 norm, then sum.

    As in mergekit the norm is matched exactly, where the paper multiplies by 1 / density.
    """
    return _combine(inputs, _dare_masks(inputs), elects=False)


@_task_vector_method(
    "dare_ties",
    per_input=(WEIGHT, DENSITY),
    shared=_shared(normalize=False, rescale=True),
    reference="arXiv:2311.03099",
    draws=True,
    state_bytes=_drawn_state,
    check=_CHECK_ELECTION,
)
def dare_ties(inputs: Inputs) -> Kernel:
    """dare_linear with the sign election of ties."""
    return _combine(inputs, _dare_masks(inputs), elects=True)


def _dare_masks(inputs: Inputs) -> list[Mask]:
    from bot.merge.streaming.masks import by_chance

    return _random_masks(inputs, lambda density, key, i: by_chance(density, key))


@_task_vector_method(
    "della",
    per_input=(WEIGHT, DENSITY, EPSILON),
    shared=_shared(normalize=True, rescale=True),
    reference="arXiv:2406.11617",
    draws=True,
    row_length=row_width,
    state_bytes=_drawn_state,
    check=_CHECK_ELECTION,
)
def della(inputs: Inputs) -> Kernel:
    """dare_ties, but large elements of a row are kept more often: with probability density +- epsilon by rank."""
    return _combine(inputs, _della_masks(inputs), elects=True)


@_task_vector_method(
    "della_linear",
    per_input=(WEIGHT, DENSITY, EPSILON),
    shared=_shared(normalize=False, rescale=True),
    reference="arXiv:2406.11617",
    draws=True,
    row_length=row_width,
    state_bytes=_drawn_state,
    check=_CHECK,
)
def della_linear(inputs: Inputs) -> Kernel:
    """della without the sign election."""
    return _combine(inputs, _della_masks(inputs), elects=False)


def _della_masks(inputs: Inputs) -> list[Mask]:
    from bot.merge.streaming.masks import by_rank

    epsilon, width = inputs.values("epsilon"), row_width(inputs.operation)
    return _random_masks(inputs, lambda density, key, i: by_rank(density, epsilon[i], key, width))


def _random_masks(inputs: Inputs, draw: Callable[[float, int, int], Callable[[Tensor, int], Tensor]]) -> list[Mask]:
    """A random mask per input; `draw` receives density, mask key and number of the input."""
    from bot.merge.streaming.masks import Drawn, DropAll, Mask

    twice = inputs.flag("rescale")
    out: list[Mask] = []
    for i, density in enumerate(inputs.values("density")):
        if density >= 1:
            out.append(Mask())
        elif density <= 0:
            out.append(DropAll())
        else:
            out.append(Drawn(draw(density, inputs.operation.keys[inputs.others[i]], i), inputs, twice))
    return out
