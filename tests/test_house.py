"""The rules of docs/design/architecture.md, read from the code: rooms, imports, homes of libraries, sizes."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("bot", "evaluators", "space")
GROUND = ("errors", "settings", "progress", "storage")
# room -> rooms it may import
ROOMS = {
    "ground": (),
    "merge": ("ground",),
    "hub": ("merge", "ground"),  # the files of a model are chosen in one place, merge/checkpoints
    "localhub": ("ground",),
    "evaluators": ("ground",),
    "jobs": ("merge", "hub", "evaluators", "ground"),
    "stages": ("jobs", "merge", "hub", "evaluators", "ground"),
    "publishing": ("jobs", "merge", "hub", "evaluators", "ground"),
    "service": ("publishing", "stages", "jobs", "merge", "hub", "evaluators", "ground"),
    "space": ("service", "publishing", "stages", "jobs", "merge", "hub", "evaluators", "ground"),
    "demo": ("service", "publishing", "stages", "jobs", "merge", "hub", "evaluators", "ground", "localhub"),
    "cli": ("service", "publishing", "stages", "jobs", "merge", "hub", "evaluators", "ground", "localhub", "demo"),
}
# parts of an engine, each after those it may import
PARTS = {
    "bot/merge": (
        "streaming", "methods", "recipe", "checkpoints", "tokenizer", "planning", "execution",
    ),
    "evaluators": (
        "figures", "generation_settings", "content", "paired", "repetition", "memory", "loading",
        "prompt_tokens", "harness", "sanity_check", "comparison", "medusa", "pictures",
    ),
    "evaluators/medusa": (
        "trees", "model", "drafting", "formats", "decoding", "training", "speed", "generation",
    ),
}  # fmt: skip
# library -> the only places that import it
HOMES = {
    "huggingface_hub": ("bot/hub/",),
    "sqlalchemy": ("bot/jobs/queue/",),
    "gradio": ("space/",),
    "subprocess": ("bot/service/executors/", "bot/stages/unpickling.py", "evaluators/harness/evaluation.py"),
    "yaml": (
        "bot/jobs/request.py",
        "bot/merge/recipe/reading.py",
        "bot/publishing/card.py",
        "bot/localhub/metadata.py",
        "evaluators/harness/task_files.py",
    ),
    "apscheduler": ("bot/service/scheduler.py",),
    "lm_eval": ("evaluators/harness/",),
    "fcntl": ("bot/storage.py",),
}
# The writer syncs the descriptors of the shards and the journal that it keeps open.
SYNCS = {"bot/storage.py", "bot/merge/execution/writer.py"}
# import name -> name on the package index, where they differ
DISTRIBUTIONS = {"yaml": "pyyaml", "re2": "google-re2", "markdown-it": "markdown-it-py"}
MAX_PARAMETERS, MAX_FUNCTION_LINES, MAX_FILE_LINES = 8, 40, 400
# functions beyond these limits, by path: those there are, and no more
LONG_FUNCTIONS = frozenset(
    {
        "benchmarks/agreement/corners.py:combinations_",
        "benchmarks/agreement/corners.py:passages",
        "benchmarks/agreement/corners.py:task_vectors",
        "benchmarks/agreement/vocabularies.py:vocabularies",
        "bot/cli/evaluate.py:evaluate",
        "bot/cli/medusa.py:generate",
        "bot/cli/medusa.py:train",
        "bot/jobs/queue/table.py:Queue.claim",
        "bot/jobs/queue/table.py:Queue.submit",
        "bot/merge/planning/work.py:work_of",
        "bot/merge/tokenizer/tokenizer.py:align",
        "evaluators/harness/journal.py:resuming",
        "space/api.py:publish",
        "space/app.py:create",
        "space/board.py:build",
        "space/submit.py:build",
    }
)
# processes that read untrusted requests or hold the token start without these
HEAVY = ("torch", "transformers", "lm_eval")
LIGHT_MODULES = (
    "bot.jobs.queue",
    "bot.service.scheduler",
    "bot.publishing.publisher",
    "bot.service.intake",
    "bot.publishing.leaderboard",
    "bot.publishing.card",
    "bot.cli.main",
    "bot.merge.planning.plan",
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
def imports(tree: ast.AST) -> tuple[str, ...]:
    """Imports of `tree` by full name, those for types included: `from bot import hub` is bot.hub."""
    return tuple(_imports(tree))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The room of a module by its full name; None if it is not ours."""
    package, _, rest = module.partition(".")
    if package not in PACKAGES:
        return None
    if package != "bot":
        return package
    first = rest.partition(".")[0]
    return "ground" if first in (*GROUND, "", "__init__", "__version__") else first


def test_each_room_imports_only_those_below_it() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in sources()
        for name in imports(tree)
        if (mine := room(path.removesuffix(".py").replace("/", ".")))
        and (theirs := room(name))
        and theirs not in (mine, *ROOMS[mine])
    ]
    assert wrong == []


def test_bot_has_no_loose_modules() -> None:
    assert {path.stem for path in (REPO / "bot").glob("*.py")} == {"__init__", *GROUND}


@pytest.mark.parametrize("engine", PARTS)
def test_each_part_of_an_engine_imports_only_those_before_it(engine: str) -> None:
    parts = PARTS[engine]

    def rank(part: str) -> int:
        assert part in parts, f"{engine}: {part} is not in PARTS"
        return parts.index(part)

    package = engine.replace("/", ".") + "."
    depth = package.count(".")
    outside = {f"{engine}/__init__.py", f"{engine}/custom_generate.py"}  # the latter is copied into repos, not imported
    wrong = [
        f"{path} imports {name}"
        for path, tree in sources()
        if path.startswith(f"{engine}/") and path not in outside
        for name in imports(tree)
        if name.startswith(package) and name != f"{package}custom_generate"
        if rank(name.split(".")[depth]) > rank(path.split("/")[depth].removesuffix(".py"))
    ]
    assert wrong == []


def test_no_import_cycles_not_even_for_types() -> None:
    files = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for path, tree in sources()}
    edges = {
        name: {
            target
            for imported in imports(tree)
            for target in (imported, imported.rpartition(".")[0])
            if target in files and target != name
        }
        for name, tree in files.items()
    }
    # a package that re-exports its modules is no cycle with them
    edges = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in edges.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(files):
        visit(name, ())


@pytest.mark.parametrize("library", sorted(HOMES))
def test_each_library_has_one_home(library: str) -> None:
    wrong = [
        path
        for path, tree in sources()
        if any(name.partition(".")[0] == library for name in imports(tree)) and not path.startswith(HOMES[library])
    ]
    assert wrong == []


def test_every_import_is_declared() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") for each in itertools.chain(*lists)}
    top = {name.partition(".")[0] for _, tree in sources() for name in imports(tree)} - set(PACKAGES)
    foreign = {name.replace("_", "-") for name in top - sys.stdlib_module_names}
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} - declared == set()


def test_files_are_synced_and_locked_in_one_place() -> None:
    def syncs(tree: ast.Module) -> bool:
        calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        return bool(calls & {"fsync", "fdatasync", "flock", "lockf"})

    assert {path for path, tree in sources() if syncs(tree)} == SYNCS


def test_only_settings_read_the_environment() -> None:
    def reads(tree: ast.Module) -> bool:
        return any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))

    assert [path for path, tree in sources() if path != "bot/settings.py" and reads(tree)] == []


def test_no_catch_all_names_and_no_long_files() -> None:
    names = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py", "manager.py"}
    files = [REPO / path for path, _ in sources((*PACKAGES, "benchmarks"))]
    assert [file for file in files if file.name in names] == []
    assert [file for file in files if len(file.read_text().splitlines()) > MAX_FILE_LINES] == []


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function as `path:Class.name`."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
            inner = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
            yield from below(child, inner)

    for path, tree in sources((*PACKAGES, "benchmarks")):
        for name, function in below(tree, ""):
            yield f"{path}:{name}", function


def test_no_function_becomes_long() -> None:
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES}
    assert long - LONG_FUNCTIONS == set()
    assert LONG_FUNCTIONS - long == set(), "take these off the list"


def test_functions_take_at_most_eight_parameters() -> None:
    def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return len([each for each in given if each.arg not in ("self", "cls")])

    many = {name for name, node in functions() if count(node) > MAX_PARAMETERS and not name.startswith("bot/cli/")}
    assert many == set()


def test_processes_that_serve_or_publish_start_without_torch() -> None:
    code = f"""
import importlib, sys
for module in {LIGHT_MODULES}:
    importlib.import_module(module)
    print(module, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in LIGHT_MODULES]
