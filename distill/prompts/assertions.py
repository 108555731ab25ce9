"""What a Python test program asserts, and which functions it calls.

Text that parses as Python is not yet a test. `add1(1) == 3`, as some data sets write their tests, computes a truth
value and drops it, `print(add1(1))` asserts nothing, and `yes` raises a NameError of its own: the first two would make
every answer correct, the last every answer wrong. So a comparison that stands alone is turned into an assert, and a
program without any statement that can fail on purpose is refused. Running the tests against a wrong answer instead
would need the sandbox when prompts are read.
"""

import ast
import builtins
import re
import warnings

FAILING = re.compile(r"_?assert|fail|raises|_?exit$|quit$|abort$")  # beginning of the functions that end a test


def parsed_program(text: str) -> ast.Module:
    """The syntax tree of a program. Errors: ValueError, the end of a sentence about the column."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # MemoryError: nested too deep
        raise ValueError(f"is not tests: {text[:40]!r} is no Python program ({type(error).__name__})") from error


def with_asserts(text: str) -> str:
    """The program with `assert` before every comparison that stands alone. Errors: ValueError, as `parsed_program`."""
    bare = [node for node in parsed_program(text).body if isinstance(node, ast.Expr) and _is_truth(node.value)]
    if not bare:
        return text
    lines = text.encode().splitlines(keepends=True)
    for node in reversed(bare):
        line, place = lines[node.lineno - 1], node.col_offset  # in bytes of UTF-8
        lines[node.lineno - 1] = line[:place] + b"assert " + line[place:]
    changed = b"".join(lines).decode()
    parsed_program(changed)
    return changed


def can_fail(text: str) -> bool:
    """Whether a program has an assert, a `raise`, or a call such as `self.assertEqual` or `sys.exit`."""
    return any(_fails(node) for node in ast.walk(parsed_program(text)))


def called_functions(text: str) -> list[str]:
    """The functions that a program calls by their names and neither defines, imports nor finds among the built-ins."""
    tree = parsed_program(text)
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    own = {name for node in ast.walk(tree) for name in _bound(node)}
    return [name for name in dict.fromkeys(called) if name not in own and not hasattr(builtins, name)]


def _is_truth(node: ast.expr) -> bool:
    match node:
        case ast.Compare():
            return True
        case ast.BoolOp(values=values):
            return any(map(_is_truth, values))
        case ast.UnaryOp(op=ast.Not()):
            return True
    return False


def _fails(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.Raise():
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return FAILING.match(name) is not None
    return False


def _bound(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return [name]
    return []
