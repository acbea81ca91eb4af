"""Recipes for the comparison with mergekit: corners, by hand.

They speak of the golden parents: `a`, `b`, `c`, `base` (llama, 4 layers, hidden 32, vocabulary 64), the same as
`*_bf16`, `x` (68 tokens, most ids permuted), `tied_a` and `tied_base` (no head). Deterministic settings only: what
draws random masks (dare, della) is taken at density 1, where nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.agreement.notation import Case, Document, flat, part_of, sliced, w, where
from benchmarks.agreement.vocabularies import vocabularies


def combinations_() -> Iterator[Case]:
    """linear, the spherical methods and model_stock."""
    ab = (("a", w(0.6)), ("b", w(0.7)))
    yield "linear_negative_weight", flat("linear", ("a", w(1.4)), ("b", w(-0.4)), ("c", w(0)))
    yield "linear_global_weight_and_base", flat("linear", "a", "b", base="base", parameters=w(0.5))
    yield "linear_one_model", flat("linear", ("a", w(3)))
    yield (
        "linear_gradients",
        flat("linear", ("a", w([0.2])), ("b", w([0, 1])), ("c", w([0.1, 0.9, 0.3, 0.8, 0, 1, 0.5]))),
    )
    levels = where(("layers.1.", 0.9), ("mlp", [0.2, 0.8, 0.1]), ("*", 0.4))
    yield "linear_levels", flat("linear", ("a", w(where(("q_proj", 1)))), "b", parameters={"weight": levels})
    yield "linear_strings", flat("linear", ("a", w("1e-1")), ("b", w("0.7")), parameters={"normalize": "false"})
    shared = where(("layers.2.", False), ("embed", False), (None, True))
    yield "linear_normalize_by_name", flat("linear", *ab, parameters={"normalize": shared})
    yield "linear_normalize_gradient", flat("linear", *ab, parameters={"normalize": [True, False]})
    crossed = part_of(
        ("a", 0, 2, w(where(("layers.1.", 0.9), (None, 0.2)))), ("b", 2, 4, w(where(("layers.3.", 0.1), (None, 0.5))))
    )
    yield "linear_crossed_layers", sliced("linear", crossed, [("b", 1, 3, w([0.1, 0.6])), ("c", 2, 4, w(0.3))])
    yield "linear_float64", flat("linear", *ab, dtype="float64")
    yield "linear_float16", flat("linear", *ab, dtype="float16")
    yield "linear_bf16_of_float32", flat("linear", *ab, dtype="bfloat16")
    yield "linear_float32_of_bf16", flat("linear", *ab, suffix="_bf16")
    yield "linear_mixed_parents", flat("linear", ("a_bf16", w(0.3)), ("b", w(0.8)), out_dtype="float16")
    yield "linear_tied", flat("linear", ("tied_a", w(0.3)), ("tied_base", w(0.8)))
    yield "linear_tied_and_untied", flat("linear", ("tied_a", w(0.3)), ("a", w(0.8)))
    yield "linear_untied_and_tied", flat("linear", ("a", w(0.3)), ("tied_a", w(0.8)))
    yield (
        "linear_module",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "modules": {"default": {"models": flat("linear", *ab)["models"], "parameters": {"normalize": False}}},
        },
    )
    for t in (0, 1, -0.3, 1.4):
        yield f"slerp_t_{t}", flat("slerp", "a", "b", base="a", parameters={"t": t})
    yield "slerp_base_second", flat("slerp", "a", "b", base="b", parameters={"t": 0.2})
    yield "slerp_base_unlisted", flat("slerp", "a", base="b", parameters={"t": 0.2})
    for values in ([0.3], [0.1, 0.9], [0, 1, 0], [0, 0.5, 0.1, 0.9, 0.3, 0.8, 1]):
        yield f"slerp_gradient_{len(values)}", flat("slerp", "a", "b", base="a", parameters={"t": values})
    yield (
        "slerp_filter_gradient",
        flat(
            "slerp", "a", "b", base="a", parameters={"t": where(("mlp", [0, 1]), ("norm", 0.9), (None, [1, 0.2, 0.7]))}
        ),
    )
    halves = part_of(("a", 0, 2), ("b", 1, 3), parameters={"t": [0.1, 0.9]}), part_of(("a", 2, 3), ("b", 3, 4))
    yield "slerp_two_slices", sliced("slerp", *halves, base="a", parameters={"t": [0.2, 0.4]})
    yield (
        "slerp_base_per_slice",
        sliced(
            "slerp",
            part_of(("a", 0, 2), ("b", 0, 2), base_model="parents/a"),
            part_of(("b", 1, 4), ("c", 1, 4), base_model="parents/c"),
            parameters={"t": 0.3},
        ),
    )
    yield (
        "slerp_bf16_gradient",
        flat("slerp", "a", "b", base="a", suffix="_bf16", dtype="bfloat16", parameters={"t": [0, 0.7, 1]}),
    )
    yield (
        "slerp_unused",
        flat(
            "slerp",
            ("a", w(0.2)),
            ("b", w(0.3)),
            base="a",
            parameters={"t": 0.5, "int8_mask": True, "embed_slerp": True},
        ),
    )
    yield "nuslerp_rows", flat("nuslerp", *ab, parameters={"nuslerp_flatten": False})
    yield "nuslerp_rows_base", flat("nuslerp", *ab, base="base", parameters={"nuslerp_flatten": False})
    yield (
        "nuslerp_columns_base",
        flat("nuslerp", *ab, base="base", parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    )
    yield "nuslerp_columns_flat", flat("nuslerp", *ab, parameters={"nuslerp_row_wise": True})
    yield "nuslerp_cancelling", flat("nuslerp", ("a", w(0.5)), ("b", w(-0.5)))
    yield "nuslerp_outside", flat("nuslerp", ("a", w(-0.3)), ("b", w(0.9)), base="base")
    yield "nuslerp_gradient", flat("nuslerp", ("a", w([0, 0.5, 1])), ("b", w(where(("mlp", 0.1), (None, [1, 0.3])))))
    yield "nuslerp_base_listed", flat("nuslerp", "base", *ab, base="base")
    yield "nuslerp_bf16", flat("nuslerp", *ab, suffix="_bf16", dtype="bfloat16")
    abc = (("a", w(0.2)), ("b", w(0.5)), ("c", w(0.4)))
    yield "multislerp_base", flat("multislerp", *abc, base="base")
    yield "multislerp_raw_weights", flat("multislerp", *abc, parameters={"normalize_weights": False})
    yield (
        "multislerp_raw_weights_base",
        flat("multislerp", *abc, base="base", parameters={"normalize_weights": False, "eps": 1e-5}),
    )
    yield "multislerp_two", flat("multislerp", *ab, parameters={"eps": "1e-3"})
    yield "multislerp_one", flat("multislerp", ("a", w(0.3)))
    yield "multislerp_one_base", flat("multislerp", ("a", w(0.3)), base="base")
    yield "multislerp_negative", flat("multislerp", ("a", w(0.9)), ("b", w(-0.2)), ("c", w(0.5)))
    yield "multislerp_bf16", flat("multislerp", *abc, base="base", suffix="_bf16", dtype="bfloat16")
    yield "karcher_two", flat("karcher", "a", "b")
    yield "karcher_one", flat("karcher", "a")
    yield "karcher_base", flat("karcher", "a", "b", base="base")
    yield "karcher_no_iteration", flat("karcher", "a", "b", "c", parameters={"max_iter": 0})
    yield "karcher_long", flat("karcher", "c", "b", "a", "base", parameters={"max_iter": 100, "tol": 1e-9})
    yield "karcher_coarse", flat("karcher", "a", "b", "c", parameters={"max_iter": 1, "tol": 0.01})
    yield "karcher_bf16", flat("karcher", "a", "b", "c", suffix="_bf16", dtype="bfloat16")
    yield "model_stock_two", flat("model_stock", "a", "b", base="base")
    yield "model_stock_rows", flat("model_stock", "a", "b", "c", base="base", parameters={"filter_wise": True})
    yield "model_stock_listed", flat("model_stock", "a", "base", "b", base="base")
    yield (
        "model_stock_slices",
        sliced(
            "model_stock",
            [("base", 0, 2), ("a", 1, 3), ("b", 2, 4)],
            [("a", 0, 1), ("base", 3, 4), ("c", 1, 2)],
            base="base",
        ),
    )
    yield (
        "model_stock_base_a",
        flat("model_stock", "b", "c", base="a", parameters={"filter_wise": where(("mlp", True), (None, False))}),
    )
    yield "model_stock_bf16", flat("model_stock", "a", "b", "c", base="base", suffix="_bf16", dtype="bfloat16")


def passages() -> Iterator[Case]:
    """passthrough, nearswap, arcee_fusion."""
    yield "passthrough_whole", flat("passthrough", "a")
    yield "passthrough_scaled", flat("passthrough", ("b", {"scale": -1.5}))
    yield "passthrough_scale_gradient", flat("passthrough", "c", parameters={"scale": [0, 1, 0.5]})
    yield "passthrough_repeats", sliced("passthrough", [("a", 0, 2)], [("a", 0, 2)], [("a", 1, 2)], [("b", 3, 4)])
    yield (
        "passthrough_scale_filter",
        sliced(
            "passthrough",
            [("a", 0, 3, {"scale": where(("layers.2.", 0.1), ("embed", 2))})],
            [("b", 2, 4)],
            parameters={"scale": where(("norm", 0.5))},
        ),
    )
    yield "passthrough_one_layer", sliced("passthrough", [("x", 2, 3, {"scale": [0.25, 2]})])
    yield "passthrough_tied", sliced("passthrough", [("tied_a", 0, 3)], [("tied_base", 1, 4)])
    yield "passthrough_tied_first", sliced("passthrough", [("tied_a", 0, 3)], [("a", 1, 4)])
    yield (
        "passthrough_bf16",
        sliced("passthrough", [("a_bf16", 0, 3, {"scale": 0.3})], [("b_bf16", 1, 4)], dtype="bfloat16"),
    )
    yield "passthrough_out_dtype", sliced("passthrough", [("a", 0, 3)], [("b", 1, 4)], out_dtype="float16")
    yield "passthrough_base_model", sliced("passthrough", [("a", 0, 3)], [("b", 1, 4)], base="c")
    for t in (0, 1e-4, 1):
        yield f"nearswap_{t}", flat("nearswap", "a", base="base", parameters={"t": t})
    yield (
        "nearswap_by_name",
        flat(
            "nearswap",
            "a",
            "base",
            base="base",
            parameters={"t": where(("mlp", [0, 0.05]), ("attn", 0.001), (None, "1e-2"))},
        ),
    )
    yield "nearswap_bf16", flat("nearswap", "a", base="base", suffix="_bf16", dtype="bfloat16", parameters={"t": 0.01})
    yield "arcee_fusion_listed", flat("arcee_fusion", "base", "b", base="base")
    yield (
        "arcee_fusion_slices",
        sliced("arcee_fusion", [("base", 0, 2), ("c", 1, 3)], [("c", 0, 3), ("base", 1, 4)], base="base"),
    )
    yield "arcee_fusion_bf16", flat("arcee_fusion", "a", base="base", suffix="_bf16", dtype="bfloat16")
    yield "arcee_fusion_tied", flat("arcee_fusion", "tied_a", base="tied_base")


def task_vectors() -> Iterator[Case]:
    """The task-vector family, sce and ram."""
    abc = (("a", w(0.5, density=0.4)), ("b", w(0.3, density=0.8)), ("c", w(-0.4, density=0.6)))
    bf16: Document = {"base": "base", "suffix": "_bf16", "dtype": "bfloat16"}
    yield (
        "task_arithmetic_normalized",
        flat("task_arithmetic", *abc, base="base", parameters={"normalize": True, "lambda": 0.5}),
    )
    yield (
        "task_arithmetic_listed",
        flat("task_arithmetic", ("base", w(7)), *abc, base="base", parameters={"rescale": True}),
    )
    yield (
        "task_arithmetic_gradient",
        flat("task_arithmetic", ("a", w([0, 1])), ("b", w([1, 0.2, 0])), base="c", parameters={"lambda": [0.5, 1.5]}),
    )
    yield "task_arithmetic_bf16", flat("task_arithmetic", *abc, **bf16)
    yield "task_arithmetic_none", flat("task_arithmetic", ("a", w(0)), base="base")
    yield (
        "task_arithmetic_cancelling",
        flat("task_arithmetic", ("a", w(0.5)), ("b", w(-0.5)), base="base", parameters={"normalize": True}),
    )
    yield (
        "task_arithmetic_slices",
        sliced(
            "task_arithmetic",
            [("base", 0, 3), ("a", 1, 4, w([0.1, 1, 0.3]))],
            [("b", 2, 4, w(0.4)), ("base", 0, 2)],
            base="base",
        ),
    )
    yield "ties_negative", flat("ties", *abc, base="base")
    yield "ties_rescaled", flat("ties", *abc[:2], base="base", parameters={"rescale": True, "lambda": 0.7})
    yield (
        "ties_edges",
        flat("ties", ("a", w(0.5, density=0)), ("b", w(0.3, density=1)), ("c", w(0.2, density=0.001)), base="base"),
    )
    yield "ties_all_off", flat("ties", ("a", w(0.5, density=0)), base="base")
    yield (
        "ties_default_density",
        flat("ties", ("a", w(0.5)), ("b", w(0.5)), "base", base="base", parameters={"normalize": False}),
    )
    yield (
        "ties_gradients",
        flat(
            "ties",
            ("a", w([0, 0.3, 0.7], density=[0.2, 1])),
            ("b", {"density": where(("mlp", [1, 0.1]), (None, 0.5))}),
            base="base",
            parameters={"weight": 0.4, "normalize": where(("attn", False), (None, True))},
        ),
    )
    yield "ties_tied", flat("ties", ("tied_a", w(1, density=0.5)), base="tied_base")
    yield "ties_bf16_three", flat("ties", *abc, **bf16)
    yield "ties_out_bf16", flat("ties", *abc[:2], base="base", out_dtype="bfloat16")
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        one = tuple((name, w(own["weight"], density=1)) for name, own in abc)
        yield f"{method}_dense", flat(method, *one, base="base")
        yield (
            f"{method}_dense_other",
            flat(
                method,
                *one[:2],
                base="base",
                parameters={"normalize": method[-1] == "r", "lambda": 1.2, "rescale": False},
            ),
        )
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        yield f"{method}_default_gamma", flat(method, *abc, base="base")
        yield (
            f"{method}_edges",
            flat(
                method,
                ("a", w(0.5, density=1, gamma=0.2)),
                ("b", w(0.4, density=0.9, gamma=0.3)),
                ("c", w(0.1, density=0, gamma=0)),
                base="base",
                parameters={"normalize": True},
            ),
        )
        yield f"{method}_rescaled", flat(method, *abc[:2], base="base", parameters={"rescale": True, "gamma": [0, 0.2]})
        yield f"{method}_bf16", flat(method, *abc[:2], **bf16)
    for topk in (0, 0.05, 1):
        yield f"sce_{topk}", flat("sce", "a", "b", "c", base="base", parameters={"select_topk": topk})
    yield "sce_default", flat("sce", "a", "b", base="base")
    yield "sce_one", flat("sce", "a", base="base", parameters={"select_topk": 0.5})
    yield (
        "sce_gradient",
        flat("sce", "a", "base", "b", base="base", parameters={"select_topk": where(("mlp", [0.2, 0.9]), (None, 0.5))}),
    )
    yield "sce_bf16", flat("sce", "a", "b", "c", **bf16, parameters={"select_topk": 0.3})
    for method in ("ram", "ramplus_tl"):
        yield f"{method}_wide", flat(method, "a", "b", "c", base="base", parameters={"epsilon": 0.03})
        yield f"{method}_listed", flat(method, "a", "base", base="base")
        yield f"{method}_bf16", flat(method, "a", "b", "c", **bf16, parameters={"epsilon": 0.01})
    yield (
        "ramplus_tl_strong",
        flat("ramplus_tl", "a", "b", "c", base="base", parameters={"r": 1.5, "alpha": 0.9, "epsilon": 0.02}),
    )
    yield (
        "ramplus_tl_slices",
        sliced(
            "ramplus_tl",
            [("base", 0, 2), ("a", 2, 4), ("b", 1, 3)],
            base="base",
            parameters={"r": [0, 0.5], "epsilon": 0.02},
        ),
    )


def corners() -> Iterator[Case]:
    yield from combinations_()
    yield from passages()
    yield from task_vectors()
    yield from vocabularies()
