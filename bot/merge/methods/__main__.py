"""Print docs/methods.md: `python -m bot.merge.methods > docs/methods.md`."""

from __future__ import annotations

from bot.merge.methods import METHODS, Absent, Base, Method, Parameter

HEAD = """# Merge methods

Generated from the registry by `python -m bot.merge.methods`. `*`: one value per model, not for the base.

| method | result | base | models | parameters | reference |
|---|---|---|---|---|---|"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *(_row(METHODS[name]) for name in sorted(METHODS))]) + "\n"


def _row(method: Method) -> str:
    most = "" if method.most == method.least else " or more" if method.most is None else f" to {method.most}"
    models = f"{method.least}{most}" + ("" if method.base is Base.IGNORED else " and the base")
    if method.base is Base.OPTIONAL:
        models = f"{method.least}{most}, with or without a base"
    parameters = [_parameter(each, "*") for each in method.per_input] + [_parameter(each, "") for each in method.shared]
    cells = (f"`{method.name}`", method.summary, method.base.value, models, "; ".join(filter(None, parameters)))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, method.reference)) + " |"


def _parameter(parameter: Parameter, mark: str) -> str:
    if not parameter.used:
        return ""
    if isinstance(parameter.default, Absent):
        default = "required" if parameter.default is Absent.REQUIRED else "unset"
    else:
        default = str(parameter.default).lower()
    limits = "" if parameter.range_text == "(-inf, inf)" else f" in {parameter.range_text}"
    return f"`{parameter.name}`{mark} ({default}{limits})"


if __name__ == "__main__":
    print(page(), end="")
