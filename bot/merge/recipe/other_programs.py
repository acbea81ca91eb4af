"""Refusal of configs of other programs given as a recipe, with the name of the program and the next step."""

from __future__ import annotations

from bot.merge.recipe.document import Reader, Table

# a top-level key that only one program's configs have -> description of the file, next step
_BY_KEY: dict[str, tuple[str, str]] = {
    "experts": (
        "this is a config of mergekit-moe, which assembles a mixture of experts from several models",
        "Run `mergekit-moe CONFIG OUT`; the models it makes can be merged here.",
    ),
    "genome": (
        "this is a config of mergekit-evolve, which searches for the parameters of a merge",
        "Write a recipe with `merge_method`, `models` and the parameters that the search found.",
    ),
    "stages": (
        "this lists the stages of a merge, one file each",
        "Put the recipes into one file as for mergekit-multi: documents separated by `---`, each but the last with a "
        "`name:` by which others use its result.",
    ),
    "layer_slices": (
        "this is a config of bakllama, which stacks layers",
        "Merge this file with `mergebot bakllama CONFIG OUT`.",
    ),
    "model_type": (
        "this is the config of a model and not a recipe",
        "Write a recipe with `merge_method` and `models`, and name the model's folder there.",
    ),
}


def refuse_other_programs(reader: Reader, top: Table) -> None:
    """Refuse a file of another program, even if unknown keys are ignored."""
    for key, (what, instead) in _BY_KEY.items():
        if key in top.items and key not in top.anchored:
            line = top.key_lines[key]
            reader.refuse("NOT_SUPPORTED", line, key, f"line {line}: {what} (`{key}`).", instead)
