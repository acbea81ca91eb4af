"""The merge methods, one file per family. Importing this package fills `METHODS`; no torch is imported."""

from importlib import import_module
from pkgutil import iter_modules

from bot.merge.methods.registry import METHODS, Absent, Base, Finding, Kind, Method, Missing, Parameter, merge_method

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")

KNOWN_PARAMETERS: dict[str, Kind] = {
    parameter.name: parameter.kind for method in METHODS.values() for parameter in (*method.per_input, *method.shared)
}

__all__ = [
    "KNOWN_PARAMETERS",
    "METHODS",
    "Absent",
    "Base",
    "Finding",
    "Kind",
    "Method",
    "Missing",
    "Parameter",
    "merge_method",
]
