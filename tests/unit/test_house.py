"""Bounds on the code itself: sizes, docstrings, untyped values. `python tests/unit/test_house.py PATH` lists the rest.

Complexity is ruff's C901 (pyproject.toml); imports have a test of their own.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("distill", "tests", "tools", "perf")
LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 80
ANY_PER_1000_LINES = 8
SHARE_WITH_DOCSTRING = 0.95
IGNORE = re.compile(r"# type: ignore(?!\[[a-z-]+(, ?[a-z-]+)*\]  +# ?\S)")  # `# type: ignore[code]  # reason`

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def long_files(paths: Iterable[Path]) -> list[str]:
    counts = ((len(path.read_text(encoding="utf-8").splitlines()), path) for path in paths)
    return [f"{path}: {count} lines" for count, path in counts if count > LINES_OF_A_FILE]


def long_functions(paths: Iterable[Path]) -> list[str]:
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function) and (count := (node.end_lineno or 0) - node.lineno + 1) > LINES_OF_A_FUNCTION:
                found.append(f"{path}:{node.lineno} {node.name}: {count} lines")
    return found


def uses_of_any(path: Path) -> list[int]:
    """Line numbers at which `Any` stands in the code; its import does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "Any"]
    quoted = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    annotations = [
        node.lineno for node in quoted if "\n" not in node.value and re.search(r"[\[ ,]Any[\], ]", node.value)
    ]
    return sorted(names + annotations)


def public(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, has a docstring) of every public class, function and method of a module."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, bool]]:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            if isinstance(node, Function) and any("overload" in ast.unparse(d) for d in node.decorator_list):
                continue
            yield f"{path}:{node.lineno} {prefix}{node.name}", ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    yield from walk(ast.parse(path.read_text(encoding="utf-8")).body, "")


def without_docstring(paths: Iterable[Path]) -> tuple[list[str], int]:
    """(public names without a docstring, how many public names there are)."""
    names = [item for path in paths for item in public(path)]
    return [name for name, documented in names if not documented], len(names)


def bare_ignores(paths: Iterable[Path]) -> list[str]:
    return [
        f"{path}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if IGNORE.search(line)
    ]


ALL = [path for folder in FOLDERS for path in files(ROOT / folder)]
PACKAGE = files(ROOT / "distill")


def test_no_file_is_too_long():
    assert not long_files(ALL)


def test_no_function_is_too_long():
    assert not long_functions(ALL)


def test_untyped_values_are_rare():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE)
    uses = sum(len(uses_of_any(path)) for path in PACKAGE)
    assert 1000 * uses / lines <= ANY_PER_1000_LINES, f"{uses} in {lines:,} lines"


def test_every_type_ignore_has_a_code_and_a_reason():
    assert not bare_ignores(PACKAGE)


def test_public_names_have_docstrings():
    missing, total = without_docstring(PACKAGE)
    assert 1 - len(missing) / total >= SHARE_WITH_DOCSTRING, f"{len(missing)} of {total}:\n" + "\n".join(missing)


if __name__ == "__main__":
    chosen = [path for name in sys.argv[1:] or ["distill"] for path in files(Path(name))]
    missing, total = without_docstring(chosen)
    uses = {path: lines for path in chosen if (lines := uses_of_any(path))}
    for title, rows in (
        ("files too long", long_files(chosen)),
        ("functions too long", long_functions(chosen)),
        ("type: ignore without a reason", bare_ignores(chosen)),
        (f"public names without a docstring ({total} public names)", missing),
        ("Any", [f"{path}: {len(lines)} at lines {', '.join(map(str, lines))}" for path, lines in uses.items()]),
    ):
        print(f"{title}: {len(rows)}", *rows, sep="\n  ")
