"""Who may import whom, and one home for each kind of I/O: the rules of the house, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("bot", "evaluators", "space")

# package -> what of ours it may import
MAY_IMPORT = {
    "space": ("space", "bot", "evaluators"),
    "bot": ("bot", "evaluators"),
    "evaluators": ("evaluators",),
}
# library -> the only places that import it
HOMES = {
    "huggingface_hub": ("bot/hub/",),
    "sqlalchemy": ("bot/queue/",),
    "gradio": ("space/",),
    "subprocess": ("bot/executors/", "bot/worker.py", "evaluators/harness/evaluation.py"),
    "yaml": (
        "bot/request.py",
        "bot/merge/recipe/reading.py",
        "bot/card.py",
        "bot/localhub/metadata.py",
        "evaluators/harness/task_files.py",
    ),
    "apscheduler": ("bot/scheduler.py",),
    "lm_eval": ("evaluators/",),
}
MERGE_MAY_IMPORT = ("bot.merge", "bot.errors", "bot.__version__")
# functions of more than 40 lines, by name: those there are, and no more
LONG_FUNCTIONS = frozenset(
    {
        "align", "build", "claim", "combinations_", "create", "evaluate", "fit", "merge", "opened", "passages",
        "publish", "resuming", "run_steps", "submit", "task_vectors", "theme", "vocabularies", "work_of",
    }
)  # fmt: skip
# the parts of bot/merge, each after those it may import
MERGE_PARTS = (
    "streaming",
    "methods",
    "recipe",
    "checkpoints",
    "tokens",
    "planning",
    "operands",
    "execution",
    "verify",
)
# the parts of evaluators/medusa, likewise
MEDUSA_PARTS = ("trees", "model", "drafting", "formats", "decoding", "training", "speed", "generation")
# what measures a checkpoint, likewise: tools, then lm-eval, what its answers prove, the pictures
EVALUATOR_PARTS = (
    "errors", "figures", "content", "paired", "repetition", "memory", "loading", "prompt_tokens",
    "generation_settings", "harness", "vitals", "comparison", "pictures", "medusa",
)  # fmt: skip
# processes that serve strangers or hold the token start without these
HEAVY = ("torch", "transformers", "lm_eval")
LIGHT_MODULES = (
    "bot.queue",
    "bot.scheduler",
    "bot.publish",
    "bot.intake",
    "bot.leaderboard",
    "bot.card",
    "bot.cli",
    "space.app",
)


@cache
def parsed(package: str) -> tuple[tuple[str, ast.Module], ...]:
    files = sorted((REPO / package).rglob("*.py"))
    return tuple((path.relative_to(REPO).as_posix(), ast.parse(path.read_text())) for path in files)


def sources(packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[str, ast.Module]]:
    for package in packages:
        yield from parsed(package)


@cache
def imports(tree: ast.AST, types: bool = True) -> tuple[str, ...]:
    """What `tree` imports, by full name: `from bot import hub` is bot.hub. Without `types`, what it runs."""
    return tuple(_imports(tree, types))


def _imports(tree: ast.AST, types: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif types or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield from _imports(node, types)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in sources()
        for name in imports(tree)
        if name.partition(".")[0] in PACKAGES and name.partition(".")[0] not in MAY_IMPORT[path.partition("/")[0]]
    ]
    assert wrong == []


def test_the_merge_engine_knows_nothing_of_the_bot_but_its_errors() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in sources()
        if path.startswith("bot/merge/")
        for name in imports(tree)
        if name.startswith("bot.") and not name.startswith(MERGE_MAY_IMPORT)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("engine", "parts"),
    [("bot/merge", MERGE_PARTS), ("evaluators", EVALUATOR_PARTS), ("evaluators/medusa", MEDUSA_PARTS)],
    ids=["merge", "evaluators", "medusa"],
)
def test_each_part_of_an_engine_imports_only_those_before_it(engine: str, parts: tuple[str, ...]) -> None:
    def rank(part: str) -> int:
        assert part in parts, f"{engine}: {part} is none of the parts"
        return parts.index(part)

    package = engine.replace("/", ".") + "."
    depth = package.count(".")
    doors = {f"{engine}/__init__.py", f"{engine}/custom_generate.py"}  # the latter is copied into repos, not imported
    wrong = [
        f"{path} imports {name}"
        for path, tree in sources()
        if path.startswith(f"{engine}/") and path not in doors
        for name in imports(tree, types=False)
        if name.startswith(package) and name != f"{package}custom_generate"
        if rank(name.split(".")[depth]) > rank(path.split("/")[depth].removesuffix(".py"))
    ]
    assert wrong == []


@pytest.mark.parametrize("library", sorted(HOMES))
def test_each_kind_of_io_has_one_home(library: str) -> None:
    wrong = [
        path
        for path, tree in sources()
        if any(name.partition(".")[0] == library for name in imports(tree)) and not path.startswith(HOMES[library])
    ]
    assert wrong == []


def test_only_settings_touch_the_environment() -> None:
    def touches(tree: ast.Module) -> bool:
        return any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))

    wrong = [path for path, tree in sources() if path != "bot/settings.py" and touches(tree)]
    assert wrong == []


def test_no_catch_all_names_and_no_file_without_end() -> None:
    names = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py", "manager.py"}
    files = [REPO / path for path, _ in sources((*PACKAGES, "benchmarks"))]
    assert [file for file in files if file.name in names] == []
    assert [file for file in files if len(file.read_text().splitlines()) > 400] == []


def test_no_function_joins_those_that_are_too_long() -> None:
    long = {
        f"{path}: {node.name}"
        for path, tree in sources((*PACKAGES, "benchmarks"))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= 40
        and node.name not in LONG_FUNCTIONS
    }
    assert long == set()


def test_processes_that_serve_or_publish_start_without_torch() -> None:
    code = f"""
import importlib, sys
for module in {LIGHT_MODULES}:
    importlib.import_module(module)
    print(module, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in LIGHT_MODULES]
