"""Recipes with tokenizers and embedding rows, for the comparison with mergekit."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.agreement.notation import Case, Document, flat, sliced, w


def vocabularies() -> Iterator[Case]:
    """Tokenizers and embedding rows."""
    ax = (("a", w(0.6)), ("x", w(0.4)))
    entries: Document = {
        "extra1": {"source": {"kind": "model_token", "model": "parents/a", "token": "w5"}},
        "extra2": {"source": {"kind": "model_token", "model": "parents/x", "token_id": 7}, "force": True},
        "extra3": {"source": {"kind": "zero"}, "force": True},
        "w7": {"source": "parents/x", "force": True},
    }
    yield "tokens_kinds", flat("linear", *ax, base="a", tokenizer={"source": "union", "tokens": entries})
    yield (
        "tokens_unforced",
        flat(
            "linear",
            *ax,
            base="a",
            tokenizer={
                "source": "union",
                "tokens": {"w3": {"source": "parents/x"}, "extra0": {"source": {"kind": "zero"}}},
            },
        ),
    )
    new = {"<new>": {"source": {"kind": "model_token", "model": "parents/x", "token": "extra1"}}}
    yield "tokens_new", flat("linear", *ax, base="a", tokenizer={"source": "union", "tokens": new})
    yield "tokens_new_base", flat("linear", *ax, base="a", tokenizer={"source": "base", "tokens": new})
    yield (
        "tokens_new_alone",
        flat("linear", *ax, base="a", tokenizer={"source": "base", "tokens": {"<new>": {"source": {"kind": "zero"}}}}),
    )
    for multiple in (1, 8, 64):
        yield (
            f"union_padded_{multiple}",
            flat("linear", *ax, base="a", tokenizer={"source": "union", "pad_to_multiple_of": multiple}),
        )
    yield "base_padded", flat("linear", *ax, base="a", tokenizer={"source": "base", "pad_to_multiple_of": 48})
    yield (
        "same_padded",
        flat("linear", ("a", w(0.6)), ("b", w(0.4)), tokenizer={"source": "union", "pad_to_multiple_of": 48}),
    )
    yield "union_without_base", flat("linear", *ax, tokenizer_source="union")
    yield "union_base_x", flat("linear", *ax, base="x", tokenizer_source="union")
    yield "base_x", flat("linear", *ax, base="x", tokenizer_source="base")
    yield "union_other_order", flat("linear", ax[1], ax[0], base="a", tokenizer_source="union")
    yield "named_x", flat("linear", *ax, base="a", tokenizer_source="parents/x")
    yield "named_a", flat("linear", *ax, base="x", tokenizer={"source": "parents/a"})
    yield "union_of_equals", flat("slerp", "a", "b", base="a", parameters={"t": 0.3}, tokenizer_source="union")
    yield "union_slerp", flat("slerp", "a", "x", base="a", parameters={"t": [0.3, 0.6]}, tokenizer_source="union")
    yield "union_slerp_base", flat("slerp", "a", "x", base="x", parameters={"t": 0.3}, tokenizer_source="base")
    yield (
        "union_ties",
        flat("ties", ("a", w(0.5, density=0.5)), ("x", w(0.4, density=0.6)), base="base", tokenizer_source="union"),
    )
    yield (
        "base_task_arithmetic",
        flat("task_arithmetic", ("a", w(0.5)), ("x", w(0.4)), base="base", tokenizer_source="base"),
    )
    yield "union_karcher", flat("karcher", "a", "x", "c", tokenizer_source="union")
    yield (
        "union_model_stock",
        flat("model_stock", "a", "x", base="base", tokenizer_source="union", parameters={"filter_wise": True}),
    )
    yield "union_sce", flat("sce", "a", "x", base="base", tokenizer_source="union", parameters={"select_topk": 0.6})
    yield (
        "union_three",
        flat(
            "linear",
            ("b", w(0.2)),
            *ax,
            tokenizer={"source": "union", "tokens": {"w9": {"source": "parents/a", "force": True}}},
        ),
    )
    yield "union_tied", flat("linear", ("tied_a", w(0.2)), ("x", w(0.5)), base="tied_a", tokenizer_source="union")
    yield (
        "union_tied_pair",
        flat(
            "slerp",
            "tied_base",
            "tied_a",
            base="tied_base",
            parameters={"t": 0.4},
            tokenizer={"source": "union", "pad_to_multiple_of": 16},
        ),
    )
    yield (
        "union_bf16",
        flat("linear", ("a_bf16", w(0.6)), ("x", w(0.4)), base="a_bf16", dtype="bfloat16", tokenizer_source="union"),
    )
    yield "union_slices", sliced("passthrough", [("a", 0, 3)], [("x", 1, 4)], base="a", tokenizer_source="union")
    yield "base_slices", sliced("passthrough", [("a", 0, 2)], [("x", 1, 4)], base="x", tokenizer_source="base")
    yield (
        "slices_slerp_union",
        sliced("slerp", [("a", 0, 3), ("x", 1, 4)], base="a", parameters={"t": [0, 1]}, tokenizer_source="union"),
    )
    yield "template", flat("linear", ("a", w(0.6)), ("b", w(0.4)), chat_template="chatml", tokenizer_source="base")
