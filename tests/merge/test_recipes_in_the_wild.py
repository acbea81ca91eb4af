"""Recipes as they lie in model cards, issues and tutorials are parsed and planned as they are written.

Each is a reduction of a shape found in public: model names are those of tiny local models, layer ranges are shortened
in proportion, the way it is written is kept. What mergekit runs, runs; what is refused is refused for a stated reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_vocabulary import SHARED, model
from tiny_checkpoints import llama_tensors, save

from bot.errors import Refused
from bot.merge.checkpoints import checkpoint
from bot.merge.planning import plan, planner
from bot.merge.recipe import reading as recipe

LAYERS = 8

RUNS: dict[str, str] = {
    # the commonest recipe of all: the first mergekit tutorial's slerp
    "tutorial slerp": """
slices:
  - sources:
      - model: org/a
        layer_range: [0, 8]
      - model: org/b
        layer_range: [0, 8]
merge_method: slerp
base_model: org/a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "block lists all the way down": """
slices:
- sources:
  - model: org/a
    layer_range:
    - 0
    - 8
  - model: org/b
    layer_range:
    - 0
    - 8
merge_method: slerp
base_model: org/a
parameters:
  t:
  - filter: self_attn
    value:
    - 0
    - 0.5
    - 1
  - value: 0.5
dtype: bfloat16
""",
    "slerp over models, base listed": """
models:
  - model: org/a
  - model: org/b
merge_method: slerp
base_model: org/a
dtype: bfloat16
parameters:
  t: [0, 0.5, 1, 0.5, 0] # V shaped curve: Hermes for input & output, WizardMath in the middle layers
""",
    "dare_ties with a bare base": """
models:
  - model: org/base
    # No parameters necessary for base model
  - model: org/a
    parameters:
      density: 0.53
      weight: 0.4
  - model: org/b
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: org/base
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "ties from the readme, gradients and filters in the models": """
models:
  - model: org/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "as mergekit writes it back: modules, flags as floats": """
base_model: org/base
dtype: float16
merge_method: della
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 8]
        model: org/a
        parameters:
          density: 0.8
          weight: 0.7
      - layer_range: [0, 8]
        model: org/b
        parameters:
          density: 0.7
          weight: 0.5
      - layer_range: [0, 8]
        model: org/base
parameters:
  epsilon: 0.1
  lambda: 0.9
  normalize: 1.0
  int8_mask: 1.0
tokenizer: {}
""",
    "frankenmerge": """
slices:
  - sources:
    - model: org/a
      layer_range: [0, 6]
  - sources:
    - model: org/b
      layer_range: [2, 8]
merge_method: passthrough
dtype: bfloat16
""",
    "a self-merge that scales repeated layers": """
merge_method: passthrough
slices:
- sources:
  - model: org/a
    layer_range: [0, 5]
- sources:
  - model: org/a
    layer_range: [3, 6]
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: 0.0
        - value: 1.0
- sources:
  - model: org/a
    layer_range: [5, 8]
dtype: bfloat16
""",
    "anchors for scales, defined at the top": """
const_tag: &scale_factor 0.7071067812 # 1/sqrt(2)

attenuate-env: &attenuated_env
  parameters:
    scale:
      - filter: q_proj
        value: *scale_factor
      - filter: k_proj
        value: *scale_factor
      - value: 1.0

slices:
  - sources:
      - model: org/a
        layer_range: [0, 4]
  - sources:
      - model: org/a
        layer_range: [2, 6]
        <<: *attenuated_env
  - sources:
      - model: org/a
        layer_range: [4, 8]
merge_method: passthrough
dtype: float16
""",
    "linear stack with a dummy second source and a tokenizer": """
merge_method: linear # use linear so we can include multiple models, albeit at a zero weight
parameters:
  weight: 1.0 # weight everything as 1 unless specified otherwise
slices:
  - sources:
      - model: org/a # embed_tokens comes along with the ride with whatever is the first layer
        layer_range: [0, 1]
      - model: org/b # add dummy second model with 0 weight so tokenizer-based merge routine is invoked
        layer_range: [0, 1]
        parameters:
          weight: 0
  - sources:
      - model: org/a
        layer_range: [1, 5]
  - sources:
      - model: org/b
        layer_range: [3, 7]
  - sources: # same as above, but for lm_head with the last layer
      - model: org/a
        layer_range: [7, 8]
      - model: org/b
        layer_range: [7, 8]
        parameters:
          weight: 0
dtype: float16
tokenizer_source: model:org/a # keep exact tokenizer
""",
    "task arithmetic without commas, weights negative": """
base_model: org/base
dtype: bfloat16
merge_method: task_arithmetic
models:
- model: org/base
- {model: org/a, parameters: {weight: 1.3}}
- model: org/b
  parameters:
    weight: -0.35
parameters: {normalize: no}
""",
    "model stock": """
models:
  - model: org/a
  - model: org/b
  - model: org/c
merge_method: model_stock
base_model: org/base
int8_mask: true
dtype: bfloat16
parameters:
  filter_wise: false
""",
    "della with everything a gradient and lambda on the model": """
base_model: org/base
parameters:
  int8_mask: true
  rescale: true
  normalize: false
merge_method: della
dtype: bfloat16
models:
  - model: org/a
    parameters:
      density: [0.45, 0.55, 0.45, 0.55, 0.45]
      epsilon: [0.1, 0.1, 0.25, 0.1, 0.1]
      lambda: 0.85
      weight: [-0.01891, 0.01554, -0.01325, 0.01791, -0.01458]
""",
    "della_linear with out_dtype and a tokenizer by name": """
models:
  - model: org/a
    parameters:
      weight: 0.20
      density: 0.7
  - model: org/b
    parameters:
      weight: 0.20
      density: 0.7
merge_method: della_linear
base_model: org/base
parameters:
  epsilon: 0.2
  lambda: 1.1
out_dtype: bfloat16
tokenizer:
  source: org/b
""",
    "dare_linear with density one": """
models:
  - model: "org/a"
    parameters: {weight: 1.0, density: 1.0}
  - model: 'org/b'
    parameters: {weight: 0.846, density: 1.0}
base_model: "org/base"
merge_method: dare_linear
dtype: bfloat16
parameters:
  lambda: 1.0
  rescale: false
""",
    "commented-out models, union tokenizer, automatic template": """
merge_method: dare_ties
base_model: org/a
models:
  - model: org/a
    parameters:
      weight: 0.2
  - model: org/b
    parameters:
      weight: 0.2
#  - model: org/c
#  - model: org/x
parameters:
  density: 0.3
tokenizer:
  source: union
chat_template: auto
#mergekit-yaml broken.yml ./out
""",
    "breadcrumbs_ties": """
models:
- model: org/a
  parameters: {weight: 0.6, density: 0.9, gamma: 0.01}
- model: org/b
  parameters: {weight: 0.4, density: 0.9, gamma: .01}
merge_method: breadcrumbs_ties
base_model: org/base
dtype: float32
out_dtype: bfloat16
parameters: {normalize: 0}
""",
    "sce, union": """
merge_method: sce
models:
  # Pivot model
  - model: org/base
  # Target models
  - model: org/a
  - model: org/b
base_model: org/base
parameters:
  select_topk: 0.15
tokenizer_source: "union"
dtype: float32
out_dtype: bfloat16
""",
    "nuslerp with a base and filters": """
merge_method: nuslerp
base_model: org/base
models:
  - model: org/a
    parameters:
      weight:
        - filter: layers.0.
          value: 1
        - value: 0.4
  - model: org/b
    parameters: {weight: 0.6}
parameters: {nuslerp_flatten: False, nuslerp_row_wise: True}
""",
    "karcher in scientific notation": """
models: [{model: org/a}, {model: org/b}, {model: org/c}]
merge_method: karcher
parameters:
  max_iter: 1000
  tol: 1e-9
dtype: torch.bfloat16
""",
    "arcee_fusion": """
models:
  - model: org/a
merge_method: arcee_fusion
base_model: org/base
dtype: float16
tokenizer_source: base
""",
    "multislerp and an eps": """
merge_method: multislerp
models:
- model: org/a
  parameters: {weight: "0.3"}
- model: org/b
  parameters: {weight: 3e-1}
parameters: {normalize_weights: yes, eps: 1e-8}
""",
    "nearswap": "merge_method: nearswap\nbase_model: org/a\nmodels: [{model: org/b}]\nparameters: {t: 0.0001}\n",
    "base_model as a mapping, the way pydantic dumps it": """
base_model:
  model:
    path: org/base
    revision: null
  lora: null
  override_architecture: null
models:
- model:
    model: {path: org/a, revision: null}
    lora: null
  parameters: {weight: 1.0}
merge_method: task_arithmetic
tokenizer_source: null
chat_template: null
""",
    "relics of early versions": """
models:
  - model: org/a
    parameters: {weight: 0.5}
  - model: org/b
    parameters: {weight: 0.5, t: 0.3}
merge_method: linear
name: my-first-merge
parameters:
  embed_slerp: true
  random_seed: 42
  residual_weight: 0
  dtype: float16
dtype: float16
""",
    "special tokens mended by hand": """
merge_method: slerp
base_model: org/a
models: [{model: org/a}, {model: org/x}]
parameters: {t: 0.4}
tokenizer:
  source: union
  tokens:
    <|im_start|>:
      source: "org/x"
    "<|im_end|>":
      source: org/x
      force: true
    <|pad|>:
      source: {kind: model_token, model: org/a, token: "</s>"}
    <|zero|>: {source: {kind: zero}}
  pad_to_multiple_of: 8
chat_template: chatml
""",
    "two stages with gradients, named": """
models:
  - model: org/base
    # No parameters necessary for base model
  - model: org/a
    #Emphasize the beginning of Vicuna format models
    parameters:
      weight: [0.22, 0.113, 0.113, 0.113, 0.113, 0.113]
      density: 0.61
  - model: org/b
    parameters: {weight: 0.19, density: 0.41}
merge_method: dare_ties
tokenizer_source: union
base_model: org/base
parameters:
  int8_mask: true
dtype: bfloat16
name: 4kmerge-v2
---
models:
  - model: 4kmerge-v2
    parameters: {weight: 0.5}
  - model: org/c
    parameters: {weight: 0.5}
merge_method: linear
dtype: bfloat16
---
""",
    "a core and a blend stacked by a third document": """
name: knowledge_core
merge_method: nuslerp
models:
  - model: org/a
    parameters:
      weight: 0.4
  - model: org/b
    parameters:
      weight: 0.6
---
name: rp_blend
merge_method: nuslerp
models:
  - {model: org/c, parameters: {weight: 0.6}}
  - {model: org/a, parameters: {weight: 0.4}}
---
merge_method: passthrough
slices:
- sources:  # Foundation
  - model: org/base
    layer_range: [0, 3]

- sources:  # Worldbuilding focus
  - model: knowledge_core
    layer_range: [3, 6]

- sources:  # Emotional intensity
  - model: rp_blend
    layer_range: [6, 8]
tokenizer:
  source: org/base
""",
    "written in another alphabet, with emoji": """
# マージ設定 🧩 — 実験用
models:
  - model: org/a  # ベース
    parameters: {weight: 0.5}
  - model: org/b  # 追加 «é»
    parameters: {weight: 0.5}
merge_method: linear
""",
    "yaml document markers, keys in capitals of YAML 1.1": """---
merge_method: linear
models:
  - model: org/a
    parameters:
      weight: +.5
  - model: org/b
    parameters:
      weight: 5_0e-2
parameters: {normalize: On, int8_mask: ~}
dtype: bfloat16
""",
    "every slice with its own parameters and base": """
merge_method: slerp
slices:
- sources:
  - {model: org/a, layer_range: [0, 4]}
  - {model: org/b, layer_range: [0, 4]}
  base_model: org/a
  parameters: {t: [0.1, 0.9]}
- sources:
  - {model: org/c, layer_range: [4, 8]}
  - {model: org/b, layer_range: [2, 6]}
  base_model: org/c
  parameters:
    t: [{filter: mlp, value: [0, 1]}]
parameters: {t: 0.5}
tokenizer_source: org/a
""",
    "ram": "merge_method: ramplus_tl\nbase_model: org/base\nmodels: [{model: org/a}, {model: org/b}]\n",
}

# what mergekit takes without a word, and we do not: the reason, and what helps
REFUSED: dict[str, tuple[str, str, str]] = {
    "a revision beside the model (mergekit merges another commit than asked)": (
        "slices:\n- sources:\n  - model: org/a\n    revision: dpo-v0\n    layer_range: [0, 8]\n"
        "merge_method: passthrough\n",
        "UNKNOWN_KEY", "org/a@dpo-v0",
    ),
    "weights outside `parameters` (mergekit misses them later)": (
        "merge_method: ties\nbase_model: org/base\nmodels:\n- model: org/a\n  density: 1.0\n  weight: 0.6\n",
        "UNKNOWN_KEY", "under `parameters:`",
    ),
    "a parameter of nobody (mergekit ignores it)": (
        "merge_method: dare_ties\nbase_model: org/base\nmodels: [{model: org/a, parameters: {weight: 1}}]\n"
        "parameters: {dare_pruning_rate: 0.2}\n",
        "UNKNOWN_KEY", "Valid here",
    ),
    "a method by a made-up name": (
        "merge_method: dare\nbase_model: org/base\nmodels: [{model: org/a, parameters: {weight: 1}}]\n",
        "UNKNOWN_METHOD", "dare",
    ),
    "della at a density its epsilon does not allow (mergekit raises while merging)": (
        "merge_method: della\nbase_model: org/base\nmodels: [{model: org/a, parameters: {weight: 1, density: 0.9}}]\n",
        "VALUE_OUT_OF_RANGE", "epsilon",
    ),
    "slerp without a base (mergekit raises too)": (
        "merge_method: slerp\nmodels: [{model: org/a}, {model: org/b}]\nparameters: {t: 0.5}\n",
        "MISSING_KEY", "base_model",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wild")
    for seed, name in enumerate(("base", "a", "b", "c", "x")):
        added = ["<|im_start|>", "<|im_end|>"] if name == "x" else []
        rows = {"model.embed_tokens.weight": None, "lm_head.weight": None}
        small = model(folder / "org" / name, seed, SHARED, added)
        tensors = {**llama_tensors(seed, layers=LAYERS), **{key: small[key] for key in rows}}
        save(folder / "org" / name, tensors, vocab_size=len(SHARED) + len(added))
    return folder


def plan_here(parsed: recipe.Recipe, folder: Path) -> plan.Plan:
    opened = {ref: checkpoint.open_checkpoint(checkpoint.LocalFiles(folder / ref.path)) for ref in parsed.repos}
    return planner.make(parsed, opened)


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_from_the_wild_is_planned_as_it_is_written(name: str, models: Path) -> None:
    parsed = recipe.parse(RUNS[name])
    assert "UNKNOWN_KEY" not in {notice.code for notice in parsed.notices}
    made = plan_here(parsed, models)
    assert made.steps
    again = recipe.from_canonical(parsed.canonical())
    assert plan_here(again, models).digest == made.digest


@pytest.mark.parametrize("name", [name for name in RUNS if name != "anchors for scales, defined at the top"])
def test_a_stranger_may_bring_the_same_recipe(name: str) -> None:
    assert recipe.parse(RUNS[name], trust="stranger") == recipe.parse(RUNS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_mergekit_would_misread_is_refused_with_what_helps(name: str, models: Path) -> None:
    text, code, hint = REFUSED[name]
    with pytest.raises(Refused) as caught:
        plan_here(recipe.parse(text), models)
    assert caught.value.code == code
    assert hint in caught.value.next_step


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][1] == "UNKNOWN_KEY"])
def test_the_operator_may_have_unknown_keys_ignored_and_noted(name: str, models: Path) -> None:
    text = REFUSED[name][0].replace("  weight: 0.6\n", "  parameters: {weight: 0.6}\n")
    parsed = recipe.parse(text, unknown_keys="ignore")
    assert "UNKNOWN_KEY" in {notice.code for notice in parsed.notices}
    assert "UNKNOWN_KEY" in {notice.code for notice in plan_here(parsed, models).notices}
