"""A model seen through a LoRA adapter: the same tensors, some with a patch, some replaced, some untied.

    Checkpoint of m + Adapter l  ->  Checkpoint of m+l, which computes what PEFT's unmerged model of both computes

An adapter changes modules. A tied pair is one stored tensor and two modules; a change of one of them unties the pair.
docs/design/merging.md 5.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from bot.errors import Refused
from bot.merge.checkpoints.adapter_config import refuse_config
from bot.merge.checkpoints.adapter_parts import (
    ModuleTensors,
    OtherTokenizer,
    SortedTensors,
    sort_tensors,
    tokenizer_files,
)
from bot.merge.checkpoints.checkpoint import Checkpoint, Files
from bot.merge.checkpoints.header import TensorInfo, refuse
from bot.merge.checkpoints.lora import WEIGHTS, Adapter
from bot.merge.checkpoints.name_matching import Fits, locate
from bot.merge.checkpoints.patches import Addend, LowRank, NewRows, Patch, as_matrix
from bot.merge.checkpoints.patterns import BadPattern
from bot.merge.checkpoints.published import published_name
from bot.merge.checkpoints.tensor_names import LAYER, stack_of
from bot.merge.checkpoints.ties import is_head
from bot.merge.checkpoints.vocabulary_ties import VocabularyTies, with_vocabulary_size
from bot.merge.recipe.spec import ModelRef, Recipe

_RESIZING = (
    "If the vocabulary was resized for training, save the adapter with save_embedding_layers=True, or resize the "
    "model's embeddings first and name the resized model."
)


def models_of(recipe: Recipe, opened: Mapping[ModelRef, Checkpoint | Adapter]) -> dict[ModelRef, Checkpoint]:
    """Every source of a recipe as written, models with an adapter seen through it. `opened` is keyed by bare refs.

    Raises `Refused`: NOT_SUPPORTED where a model is an adapter or an adapter a model; SHAPE_MISMATCH and
    TENSOR_MISSING where an adapter does not fit.
    """
    return {ref: _model(ref, opened) for ref in recipe.sources}


def _model(ref: ModelRef, opened: Mapping[ModelRef, Checkpoint | Adapter]) -> Checkpoint:
    model = opened[ref.bare]
    if isinstance(model, Adapter):
        base = model.config.trained_on or "its base"
        next_step = f"Name the model it belongs to: `{base[:80]}+{ref.bare}`."
        raise Refused("NOT_SUPPORTED", f"{ref.bare} is a LoRA adapter, not a model.", next_step, value=str(ref))
    if ref.lora is None:
        return model
    adapter = opened[ref.lora]
    if not isinstance(adapter, Adapter):
        next_step = "An adapter must follow the `+`: a repo with adapter_config.json and adapter_model.safetensors."
        raise Refused("NOT_SUPPORTED", f"{ref.lora} is a whole model, not a LoRA adapter.", next_step, value=str(ref))
    return through(model, adapter, ref)


def through(model: Checkpoint, adapter: Adapter, ref: ModelRef) -> Checkpoint:
    """`model` seen through `adapter`; `ref` is the reference as written, `m+l`."""
    assert ref.lora is not None
    return _AdapterApplication(model, adapter, ref, ref.lora).run()


class _AdapterApplication:
    """Finds the model's tensor for every tensor of an adapter, and what happens to it."""

    def __init__(self, model: Checkpoint, adapter: Adapter, ref: ModelRef, lora: ModelRef) -> None:
        self.model, self.adapter, self.ref, self.lora = model, adapter, ref, lora
        self.tensors = dict(model.tensors)
        self.elsewhere: dict[str, ModelRef] = {}
        self.patches: dict[str, Patch] = {}
        self.notices: list[str] = []
        self.files: Files = model.files
        self.config: Mapping[str, Any] = model.config
        self.ties = VocabularyTies(model)
        self.layout = _MatrixLayout(_by_biases(model.tensors))

    def run(self) -> Checkpoint:
        parts = sort_tensors(self.adapter)
        if parts.unknown:
            self._refuse_unmatched(parts.unknown[0])
        self._locate(parts)
        self.adapted = _MatrixLayout(self._orientations(parts))
        replacing = {name: t for name, t in parts.saved.items() if self._replaces(name, parts)}
        for name in sorted(parts.saved.keys() - replacing.keys(), key=is_head):  # PEFT loads the head last
            self._replace(self._stored(name, parts.saved[name]), parts.saved[name])
        changed = {f"{module}.weight": next(iter(tensors.values())) for module, tensors in parts.modules.items()}
        owns = {name: self._member(name, tensor) for name, tensor in (changed | replacing).items()}
        self._untie(owns, parts)
        for name, own in owns.items():
            if name in replacing:
                self._replace(own, replacing[name])
            else:
                self._change(name.removesuffix(".weight"), own, parts.modules[name.removesuffix(".weight")])
        self._note_base()
        self._check_rows()
        return replace(
            self.model,
            name=str(self.ref),
            config=self.config,
            tensors=self.tensors,
            files=self.files,
            sizes=self.model.sizes if self.files is self.model.files else self.files.sizes(),
            patches=self.patches,
            elsewhere=self.elsewhere,
            notices=(*self.model.notices, *self.notices),
        )

    def _replaces(self, name: str, parts: SortedTensors) -> bool:
        """True if a saved tensor belongs to one of `modules_to_save`, and not to the base below a factor."""
        module = name.rpartition(".")[0]
        return self.adapter.config.replaces(module) and module not in parts.modules

    # ---- names

    def _locate(self, parts: SortedTensors) -> None:
        wanted: dict[str, Fits] = {name: partial(_same_but_rows, tensor.shape) for name, tensor in parts.saved.items()}
        for module, tensors in parts.modules.items():
            wanted[f"{module}.weight"] = partial(_fits_module, tensors)
            if "bias" in tensors:
                wanted[f"{module}.bias"] = partial(_same_but_rows, tensors["bias"].shape)
        self.located = locate(wanted, self.model.tensors, partial(published_name, self.model.config))
        moved = next(((name, own) for name, own in self.located.names.items() if name != own), None)
        if moved is not None:
            self.notices.append(f"{self.ref}: the adapter's {moved[0]} is taken to be {moved[1]}")

    def _stored(self, name: str, tensor: TensorInfo) -> str:
        """The stored tensor that holds a module's weight, its own or that of the pair it belongs to."""
        if name in self.located.ambiguous:
            self._refuse_ambiguous(name)
        own = self.located.names.get(name) or self.ties.source_of(name)
        if own is None:
            self._refuse_unmatched(tensor.name)
        return own

    def _member(self, name: str, tensor: TensorInfo) -> str:
        """The module's own tensor; one of a pair gets its own from the stored one."""
        stored = self._stored(name, tensor)
        if name in self.located.names:
            return stored
        own = self.ties.name_of(name)
        self._own_copies()
        if own not in self.tensors:
            self._refuse_unmatched(tensor.name)
        return own

    def _own_copies(self) -> None:
        """Give every module that reads a stored matrix its own tensor: an untied model needs all of them."""
        for name, stored in self.ties.readers.items():
            if name in self.tensors:
                continue
            self.tensors[name] = replace(self.tensors[stored], name=name)
            if stored in self.elsewhere:
                self.elsewhere[name] = self.elsewhere[stored]
            self.notices.append(f"{self.ref}: the adapter unties {name} from {stored}, so both are written")

    def _untie(self, owns: dict[str, str], parts: SortedTensors) -> None:
        """Give the other half of a pair its own tensor where the adapter changes the stored half by itself."""
        name = next((name for name, own in owns.items() if own == self.ties.source), None)
        if name is None:
            return
        module = parts.modules.get(name.removesuffix(".weight"))
        others = [own for own in owns.values() if own != owns[name] and self.ties.counts_tokens(own)]
        if module is not None and "tokens" in module and not others:
            return  # PEFT trains single tokens of all modules that read the matrix
        if self.ties.shared:
            self.notices.append(f"{self.ref}: the change of {owns[name]} is left out: only its copies are read")
            del owns[name]
            return
        self._own_copies()

    # ---- changes

    def _replace(self, own: str, tensor: TensorInfo) -> None:
        """Put a tensor that the adapter saved whole in place of the model's."""
        before = self.tensors[own].shape
        if before != tensor.shape and not (before[1:] == tensor.shape[1:] and self.ties.counts_tokens(own)):
            self._refuse_shape(self.tensors[own], f"a saved tensor {list(tensor.shape)}")
        self.tensors[own] = replace(tensor, name=own)
        self.elsewhere[own] = self.lora

    def _change(self, module: str, own: str, tensors: ModuleTensors) -> None:
        if "tokens" in tensors:
            self.patches[own] = self._new_rows(module, tensors, self.tensors[own])
            return
        self.patches[own] = self._low_rank(module, tensors, self.tensors[own])
        if "bias" in tensors:
            self._add_bias(module, tensors["bias"], self.patches[own].scale)

    def _low_rank(self, module: str, tensors: ModuleTensors, weight: TensorInfo) -> LowRank:
        embedding = "lora_embedding_A" in tensors
        a, b = (tensors.get(f"lora_{'embedding_' if embedding else ''}{part}") for part in "AB")
        if a is None or b is None:
            self._refuse_content(f"lacks lora_{'A' if a is None else 'B'} of `{module[:80]}`.")
        try:
            rank, scale = self.adapter.config.rank_of(module), self.adapter.config.scale_of(module)
        except BadPattern as bad:
            refuse_config(self.adapter.name, "rank_pattern and alpha_pattern", f"hold a pattern that {bad}")
        if a.shape[:1] != (rank,) or b.shape[1:2] != (rank,):
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            self._refuse_content(f"has factors {shapes} for `{module[:80]}`, its config says rank {rank}.")
        factors = f"factors {list(a.shape)} and {list(b.shape)}"
        if max(b.shape[2:], default=1) > 1 or (len(a.shape) > 2 and a.shape[1:] != weight.shape[1:]):
            self._refuse_shape(weight, factors)  # of a convolution B is (out, r, 1, 1)
        sides = (b.shape[0], a.elements // rank)
        shape, transposed_shape = as_matrix(weight.shape), as_matrix(weight.shape)[::-1]
        possible = (transposed_shape,) if embedding else (shape, transposed_shape)
        if len(weight.shape) < 2 or sides not in possible or rank > max(sides):
            self._refuse_shape(weight, factors)
        transposed = embedding or sides != shape
        if shape == transposed_shape and not embedding and LAYER.search(module):
            transposed = self._inputs_first(weight.name)
        return LowRank(self.lora, a, b, scale, transposed, self._magnitude(tensors, module, weight, sides[0]))

    def _inputs_first(self, name: str) -> bool:
        """True if a square matrix is stored (in, out). PEFT's config has the value of its last module only."""
        for layout in (self.layout, self.adapted):
            first = layout.inputs_first(name)
            if first is not None:
                return first
        return self.adapter.config.fan_in_fan_out

    def _orientations(self, parts: SortedTensors) -> Iterator[tuple[str, bool]]:
        """The orientation of adapted matrices that are not square, by the shapes of their factors."""
        for module, tensors in parts.modules.items():
            own, a, b = self.located.names.get(f"{module}.weight"), *map(tensors.get, ("lora_A", "lora_B"))
            if own is None or a is None or b is None:
                continue
            shape = self.model.tensors[own].shape
            if len(shape) == 2 and shape[0] != shape[1]:
                yield own, (b.shape[0], a.shape[-1]) == shape[::-1]

    def _magnitude(self, tensors: ModuleTensors, module: str, weight: TensorInfo, outputs: int) -> TensorInfo | None:
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is None and self.adapter.config.dora:
            self._refuse_content(f"lacks the magnitudes of `{module[:80]}`; its config says DoRA.")
        if magnitude is not None and (magnitude.elements != outputs or max(magnitude.shape, default=1) != outputs):
            self._refuse_shape(weight, f"magnitudes {list(magnitude.shape)}")
        return magnitude

    def _new_rows(self, module: str, tensors: ModuleTensors, weight: TensorInfo) -> NewRows:
        values, rows = tensors["tokens"], self.adapter.config.tokens_of(module)
        if len(tensors) > 1:
            self._refuse_content(f"changes `{module[:80]}` both by factors and by single tokens.")
        if values.shape != (len(rows), *weight.shape[1:]) or max(rows, default=0) >= weight.shape[0]:
            self._refuse_shape(weight, f"rows {list(values.shape)} for {len(rows)} tokens up to {max(rows, default=0)}")
        return NewRows(self.lora, values, rows)

    def _add_bias(self, module: str, vector: TensorInfo, scale: float) -> None:
        own = self.located.names.get(f"{module}.bias")
        if own is None:
            message = f"{self.adapter.name} has `{vector.name[:120]}`, a change of a bias that {self.ref.bare} lacks."
            next_step = "Train it with `lora_bias: false`; PEFT cannot merge such an adapter either."
            raise Refused("TENSOR_MISSING", message, next_step, value=vector.name)
        if self.tensors[own].shape != vector.shape:
            self._refuse_shape(self.tensors[own], f"a change of shape {list(vector.shape)}")
        self.patches[own] = Addend(self.lora, vector, scale)
        if not self.adapter.config.bias:
            notice = (
                f"{self.adapter.name}: its lora_B.bias tensors are added; PEFT adds them only with `lora_bias: true`"
            )
            if notice not in self.notices:
                self.notices.append(notice)

    def _check_rows(self) -> None:
        """The matrices with a row for every token still have equally many; the config counts them."""
        rows = {name: self.tensors[name].shape[0] for name in self.tensors if self.ties.counts_tokens(name)}
        before = {self.model.tensors[name].shape[0] for name in rows if name in self.model.tensors}
        changed = {name: count for name, count in rows.items() if {count} != before}
        if len(before) != 1 or not changed:
            return
        if len(set(rows.values())) > 1:
            shapes = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
            message = f"Through {self.adapter.name} the vocabularies differ: {shapes}."
            next_step = (
                "Save the adapter with both embedding and head (save_embedding_layers=True), or resize the model's "
                "embeddings first and name the resized model."
            )
            raise Refused("SHAPE_MISMATCH", message, next_step, value=next(iter(changed)))
        count = next(iter(changed.values()))
        self.config = with_vocabulary_size(self.config, count)
        self.notices.append(f"{self.ref}: the adapter's vocabulary has {count:,} rows, the model's {before.pop():,}")
        self._take_tokenizer()

    def _take_tokenizer(self) -> None:
        """A resized vocabulary goes with the tokenizer that was saved beside it."""
        names = tokenizer_files(self.adapter.sizes)
        if not names:
            self.notices.append(f"{self.adapter.name} has no tokenizer; the one of {self.ref.bare} may lack its tokens")
            return
        self.files = OtherTokenizer(self.model.files, self.adapter.files, names)
        self.elsewhere |= dict.fromkeys(names, self.lora)

    # ---- notices and refusals

    def _note_base(self) -> None:
        trained_on, model = self.adapter.config.trained_on, self.ref.bare.path
        names = [path.rstrip("/").split("/")[-1].lower() for path in (trained_on or "", model)]
        if names[0] != names[1]:
            base = (
                f"was trained on {trained_on[:80]!r}"
                if trained_on is not None
                else "does not say on which model it was trained"
            )
            self.notices.append(f"{self.adapter.name} {base}; its shapes fit {model}")

    def _refuse_content(self, what: str) -> NoReturn:
        refuse(f"{self.adapter.name}: {WEIGHTS}", what)

    def _refuse_unmatched(self, name: str) -> NoReturn:
        message = f"{self.adapter.name} has `{name[:120]}`, for which {self.ref.bare} has no tensor."
        raise Refused("TENSOR_MISSING", message, self._next_step(), value=name)

    def _refuse_ambiguous(self, name: str) -> NoReturn:
        several = self.located.ambiguous[name]
        why = (
            f"may mean {' or '.join(several[:3])}; neither the path nor the shapes tell which"
            if len(several) > 1
            else f"means {several[0]}, which another of its tensors means too"
        )
        message = f"{self.adapter.name}: on {self.ref.bare}, its {name[:120]} {why}."
        next_step = f"{self._next_step()} Or rename its tensors after those of the model."
        raise Refused("TENSOR_MISSING", message, next_step, value=name)

    def _refuse_shape(self, weight: TensorInfo, description: str) -> NoReturn:
        message = f"{self.adapter.name} has {description} for {weight.name}, {self.ref.bare} has {list(weight.shape)}."
        next_step = _RESIZING if self.ties.counts_tokens(weight.name) else self._next_step()
        raise Refused("SHAPE_MISMATCH", message, next_step, value=weight.name)

    def _next_step(self) -> str:
        trained_on = self.adapter.config.trained_on
        return f"Use it on the model it was trained on{f', {trained_on[:80]}' if trained_on else ''}."


def _same_but_rows(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    return stored[1:] == shape[1:]


def _fits_module(tensors: ModuleTensors, stored: tuple[int, ...]) -> bool:
    """True if a stored weight may be the one of a module with these parts, in either orientation."""
    tokens = tensors.get("tokens")
    if tokens is not None:
        return _same_but_rows(tokens.shape, stored)
    a, b = (tensors.get(f"lora_{part}") or tensors.get(f"lora_embedding_{part}") for part in "AB")
    if a is None or b is None or not a.shape or not a.shape[0] or not b.shape:
        return False
    sides = (b.shape[0], a.elements // a.shape[0])
    return as_matrix(stored) in (sides, sides[::-1])


class _MatrixLayout:
    """The orientation of square matrices: (out, in) as in nn.Linear, or (in, out) as in transformers' Conv1D (GPT-2).

    Inferred from similar matrices whose orientation is known: pairs (name, inputs come first).
    """

    def __init__(self, evidence: Iterable[tuple[str, bool]]) -> None:
        self._votes: dict[tuple[str, ...], set[bool]] = {}
        for name, first in evidence:
            for key in _groups(name):
                self._votes.setdefault(key, set()).add(first)

    def inputs_first(self, name: str) -> bool | None:
        """True if a matrix is stored (in, out), as others of its name or else of its stack; None if unknown."""
        for key in _groups(name):
            votes = self._votes.get(key, set())
            if len(votes) == 1:
                return next(iter(votes))
        return None


def _by_biases(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bool]]:
    """The evidence of a checkpoint: the bias of a matrix that is not square is as long as the side of its outputs."""
    for name, tensor in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if bias is None or len(tensor.shape) != 2 or tensor.shape[0] == tensor.shape[1] or len(bias.shape) != 1:
            continue
        if bias.shape[0] in tensor.shape:
            yield name, bias.shape[0] == tensor.shape[1]


def _groups(name: str) -> Iterator[tuple[str, ...]]:
    """Groups that a matrix is compared with: those of the same name in its stack of layers, then all of the stack."""
    stack = stack_of(name)
    yield stack, name.removesuffix(".weight").rpartition(".")[2]
    yield (stack,)
