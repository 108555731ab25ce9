"""The program in several code blocks of an answer, by the names that its tests use.

Models write more than one block: a solution and then its unit tests, an example of its use or a slower alternative; or
a helper in one block and the function in the next. So the last block is not the program, and where the tests name a
function it need not be guessed: it is the last block that defines it with a body, since a reminder of the signature has
none. Blocks that define what this one uses and lacks are put around it, in the order of the answer. Rejected: joining
all blocks, whose examples print and read input, and whose later versions of a function replace the right one.
"""

import ast
import builtins
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

DEFINITION = re.compile(r"^(?:async )?(?:def|class) (\w+)", re.MULTILINE)
SOLUTION = "Solution"  # class whose methods are called as functions


class Block(NamedTuple):
    """A code block. defined: names of its functions, classes and variables. imported: names of its imports, `*` among
    them. lacking: names that it uses and does not bind. parsed: whether it is Python. stubs: functions without a
    body."""

    defined: frozenset[str]
    imported: frozenset[str]
    lacking: frozenset[str]
    parsed: bool = True
    stubs: frozenset[str] = frozenset()


def joined_program(texts: Sequence[str], names: frozenset[str]) -> str | None:
    """The blocks that define `names`, and those that define what these lack; None where no block defines any of them.

    texts: of the blocks, in the order of the answer.
    """
    blocks = [_block(text) for text in texts]
    taken: list[int] = []
    for name in sorted(names):
        defining = [number for number, block in enumerate(blocks) if name in block.defined]
        ranks = [(blocks[number].parsed, name not in blocks[number].stubs, number) for number in defining]
        if ranks and (number := max(ranks)[-1]) not in taken:
            taken.append(number)
    for user in taken:  # which grows
        for name in sorted(blocks[user].lacking):
            supplier = _supplier(name, blocks, user)
            if supplier is not None and not any(_binds(blocks[other], name) for other in taken):
                taken.append(supplier)
    return "\n".join(texts[number].rstrip("\n") for number in sorted(taken)) + "\n" if taken else None


def _supplier(name: str, blocks: Sequence[Block], user: int) -> int | None:
    """The last block before the user that binds a name, else the first after it, else the last with a star import."""
    binding = [number for number, block in enumerate(blocks) if _binds(block, name)]
    stars = [number for number, block in enumerate(blocks) if "*" in block.imported]
    before = [number for number in binding if number < user]
    return before[-1] if before else binding[0] if binding else stars[-1] if stars else None


def binds(text: str, name: str) -> bool:
    """Whether a program defines or imports a name."""
    return _binds(_block(text), name)


def _binds(block: Block, name: str) -> bool:
    return name in block.defined or name in block.imported


def used_names(code: str) -> set[str]:
    """The names that code uses and neither binds nor finds among the built-ins."""
    return set(_block(code).lacking)


def _block(text: str) -> Block:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Block(frozenset(DEFINITION.findall(text)), frozenset(), frozenset(), parsed=False)
    defined = {name for node in tree.body for name in _defined(node)}
    imported = {name for node in ast.walk(tree) for name in _imported(node)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, named) and node.name}
    lacking = used - bound - defined - imported - vars(builtins).keys()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    stubs = {node.name for node in functions if all(map(_is_empty, node.body))}
    return Block(frozenset(defined), frozenset(imported), frozenset(lacking), stubs=frozenset(stubs))


def _is_empty(node: ast.stmt) -> bool:
    """Whether a statement of a function does nothing: `...`, a docstring, `pass`, `raise NotImplementedError`."""
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a module binds, without imports. Methods of `Solution` count as functions."""
    match node:
        case ast.ClassDef(name=name, body=body):
            methods = [m.name for m in body if isinstance(m, ast.FunctionDef)] if name == SOLUTION else []
            return [name, *methods]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Import() | ast.ImportFrom():
            return []
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    return []
