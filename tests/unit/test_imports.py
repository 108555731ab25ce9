"""Who may import whom, held against every import statement in distill/, wherever in a file it stands.

A *room* is a file or a folder directly inside distill/, or a part of one that has a line of its own in `ALLOWED`.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "distill"

STAGES = {"generate", "filters", "train", "eval", "report", "serve", "plan"}
SHARED = {"recipe", "config", "catalog", "chat", "limits", "traces", "prompts", "run", "hardware"}
SHARED |= {
    "artefacts",
    "children",
    "interrupts",
    "lock",
    "model_cards",
    "model_families",
    "model_files",
    "models",
    "objectives",
    "planned",
    "record",
    "section",
    "thinking",
    "stage",
    "errors",
    "integrity",
    "console",
    "durable",
    "fingerprint",
    "evaluations",
    "gguf_files",
}
BELOW_STAGES = {"grading", "grading.judge", "grading.sandbox", "backends"} | SHARED

# room → the rooms it may import. What is not listed here is not a room yet: add it, and say what it may know.
ALLOWED: dict[str, set[str]] = {
    "": {"api"},  # the package itself, which imports the Python API on first use
    "api": BELOW_STAGES,
    "keeper": set(),
    "command": {"cli", "interrupts"},
    "cli": {"pipeline", "doctor", "plan", "push"} | STAGES | BELOW_STAGES,
    "doctor": BELOW_STAGES | {"engine.kernels", "engine.families", "train.student.float8"},
    "push": SHARED,
    "pipeline": STAGES | BELOW_STAGES | {"filters.pipeline", "filters.cluster"},
    **{stage: BELOW_STAGES for stage in STAGES},
    # Rewards and the monitor of learning from rollouts judge a trace as these filters do.
    # A training step on a processor runs on the compiled kernels, too.
    "train": BELOW_STAGES
    | {"engine.families", "engine.kernels"}
    | {f"filters.{name}" for name in ("base", "correct", "format", "language", "repetition")},
    "plan": BELOW_STAGES | {"generate", "train", "engine.spec", "engine.families"},
    "grading": {"backends", "grading.sandbox"} | SHARED,
    "grading.sandbox": {"errors"},  # most of it runs behind walls, where nothing else of the package is
    "grading.judge": {"grading", "backends", "recipe.rubric", "recipe.template"} | SHARED,  # a grader that is a model
    # Tokens of models that the engine does not compute are drawn by its op, too.
    "backends": {"engine", "engine.kernels", "keeper"} | SHARED,
    **{room: SHARED for room in SHARED},
    "model_files": SHARED | {"engine.config"},
    "model_cards": SHARED | {"engine.families"},
    "model_families": {"engine.families", "model_files"},
    "gguf_files": SHARED | {"gguf_metadata", "gguf_tokenizer", "engine.config", "engine.families", "engine.spec"},
    "gguf_metadata": {"engine.families", "errors"},
    "gguf_tokenizer": {"errors"},
    "catalog": SHARED | {"engine.families"},  # what a card says of its model is compared with the model
    # The recipe is made of the filters' settings, so filters know what a trace is, and neither recipe nor run.
    "recipe": SHARED | {"filters", "grading.sandbox", "engine.families"},
    "filters": {
        "errors",
        "section",
        "thinking",
        "chat",
        "grading",
        "grading.sandbox",
        "traces.trace",
        "traces.ledger",
        "prompts.prompt",
        "recipe.rubric",
    },
    "recipe.rubric": {"section", "recipe.template"},  # what a judge is asked: of the recipe, and of a filter
    "recipe.template": set(),
    "filters.pipeline": BELOW_STAGES | {"filters", "filters.cluster", "filters.resources", "filters.summary"},
    "filters.cluster": BELOW_STAGES | {"filters", "filters.resources"},
    "filters.resources": BELOW_STAGES | {"filters"},
    "filters.summary": BELOW_STAGES | {"filters"},
    "traces.trace": {"chat", "prompts.prompt"},
    "traces.ledger": {"durable", "errors"},
    "prompts.prompt": set(),
    "prompts.boxes": set(),
    "prompts.assertions": set(),
    "prompts.code_tests": {"prompts.assertions", "prompts.columns"},
    "prompts.columns": {"errors", "limits"},
    "prompts.gym": {"errors", "prompts.prompt"},
    "engine": {"engine.kernels"},
    "engine.kernels": {"engine.kernels", "errors"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it: `traces.trace`, and `traces` for its __init__."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of this package that a syntax tree imports, by their names inside it; "" is the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            targets = [node.value] if re.fullmatch(r"distill(\.\w+)+", node.value) else []  # for importlib
        else:
            continue
        for target in targets:
            top, _, inner = target.partition(".")
            if top != "distill":
                continue
            while inner and inner not in known:  # `from distill.errors import UserError`: the module is distill.errors
                inner = inner.rpartition(".")[0]
            yield inner


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ALLOWED else parts[0]


def may_import(importer: str, imported: str) -> bool:
    """Whether the arrows allow it; both are module names inside the package."""
    if room(importer) == room(imported) or imported == "":  # the package itself holds the version
        return True
    allowed = ALLOWED[room(importer)]
    whole = room(imported).partition(".")[0]  # a part of a shared room is as shared as the room
    return room(imported) in allowed or imported in allowed or (whole in allowed and whole in SHARED)


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: set(imports(ast.parse(path.read_text(encoding="utf-8")), set(found))) for name, path in found.items()}


def test_every_import_follows_the_arrows():
    edges = graph()
    unknown = {room(name) for name in edges if name} - ALLOWED.keys()
    assert not unknown, f"new rooms {unknown}: add them to ALLOWED with what they may import"
    upward = [f"{a} imports {b}" for a, targets in edges.items() for b in sorted(targets) if a and not may_import(a, b)]
    assert not upward, "\n".join(upward)


def test_importing_the_package_imports_nothing_of_its_own():
    code = "import sys, distill; print([name for name in sys.modules if name.startswith('distill.')])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    assert graph()[""] == {"api"}


def test_no_circles_between_rooms():
    rooms: dict[str, set[str]] = {}
    for name, targets in graph().items():
        rooms.setdefault(room(name), set()).update(room(t) for t in targets if room(t) not in (room(name), ""))
    try:
        list(TopologicalSorter(rooms).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_circles_between_modules():
    try:
        list(TopologicalSorter({name: targets - {name, ""} for name, targets in graph().items()}).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from distill.errors import UserError", {"errors"}),
        ("def f():\n    import distill.traces.store as s", {"traces.store"}),
        ("from distill.traces import store", {"traces.store"}),
        ("from distill.traces import Trace", {"traces"}),
        ("if TYPE_CHECKING:\n    from distill.traces.trace import Trace, Verdict", {"traces.trace"}),
        ("from distill import __version__", {""}),
        ("importlib.import_module('distill.traces.store')", {"traces.store"}),
        ("'see distill.traces.store'", set()),
        ("import distillery, torch\nfrom distilled.errors import x", set()),
    ],
)
def test_imports_are_read_from_every_form(code, expected):
    assert set(imports(ast.parse(code), {"", "cli", "errors", "traces", "traces.trace", "traces.store"})) == expected


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "pipeline", True),
        ("pipeline", "cli", False),
        ("train.loop", "grading.math", True),
        ("train.loop", "eval.statistics", False),
        ("generate", "filters", False),
        ("recipe", "generate", False),
        ("grading.worker", "train.loop", False),
        ("backends.local", "engine.engine", True),
        ("eval.runner", "engine.engine", False),
        ("plan.memory", "engine.spec", True),
        ("plan.memory", "engine.model", False),
        ("engine.model", "errors", False),
        ("engine.model", "engine.kernels.reference", True),
        ("engine.kernels.reference", "engine.model", False),
        ("recipe.filter", "filters.format", True),
        ("recipe.filter", "filters.pipeline", False),
        ("filters.format", "recipe", False),
        ("filters.format", "traces.store", False),
        ("filters.pipeline", "recipe", True),
        ("generate", "traces.trace", True),
    ],
)
def test_the_arrows_say_what_the_design_says(importer, imported, allowed):
    assert may_import(importer, imported) is allowed


def test_the_command_line_starts_without_the_heavy_libraries():
    code = """
import json, sys
sys.argv = ["distill", "--help"]
from distill.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
json.dump(sorted({name.partition(".")[0] for name in sys.modules}), sys.stderr)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    loaded = set(json.loads(result.stderr))
    assert "Usage: distill" in result.stdout
    assert "distill" in loaded
    heavy = {"torch", "transformers", "datasets", "pyarrow", "pandas", "numpy", "pydantic", "yaml", "matplotlib"}
    assert not loaded & heavy
