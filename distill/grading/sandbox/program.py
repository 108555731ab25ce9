"""What runs in the process of a program, after it is confined: a script, the names of an answer, or tests.

    {"role": "script", "code", "given"}             run it as __main__: standard input to standard output
    {"role": "answer", "code", "setup", "given"}    run it, then serve its names on the channel (`peer`)
    {"role": "tests", "setup", "tests", "entry"}    run tests against an answer on the channel, write the result

The result of tests is a line of JSON on a descriptor that only this process has: `passed`, or why not. The answer runs
elsewhere, so nothing that it does to its own process can write it.
"""

import ast
import atexit
import builtins
import importlib
import io
import json
import os
import site
import socket
import sys
import threading
import traceback
import types
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

from distill.grading.sandbox.peer import FOR_ANSWERS, OPERATIONS, AnswerError, Ended, Peer, Remote

DESCRIPTORS = {"input": 0, "output": 1, "errors": 2, "channel": 3, "result": 4}
FRAMES = 20  # of a traceback, the outermost; 50,000 calls deep, all would take seconds
OWN_FAULT = "tests fail by themselves"
MODULES = {*sys.stdlib_module_names, "np", "numpy", "pd", "pandas"}  # names that tests take for modules


class Test(TypedDict):
    """One test: Python code. type: `assert` or `program`."""

    type: str
    code: str


class Outcome(TypedDict):
    """The result of tests. reason: short and countable; `OWN_FAULT` where they fail whatever the answer is. detail: the
    end of the traceback. number: of the test."""

    passed: bool
    reason: str
    detail: str
    number: int


def run(request: Mapping[str, object]) -> int:
    """Run what a request says; returns the exit code."""
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    sys.argv = ["main.py"]
    for provide in (site.setquit, site.setcopyright, site.sethelper):  # `exit` and others, which `-S` leaves out
        provide()
    if "/dev/std" in str(request.get("code")):
        vars(builtins)["open"] = vars(io)["open"] = _open
    match request["role"]:
        case "script":
            names = _module("__main__")
            names["__file__"] = "main.py"
            return _finished(lambda: _execute_all((str(request[part]) for part in ("given", "code")), names))
        case "answer":
            return _finished(lambda: _serve([str(request[part]) for part in ("given", "setup", "code")]))
    return _test(request)


def _open(file: object, *args: object, **names: object) -> object:
    """`open` where /dev/stdin, /dev/stdout and /dev/stderr exist, which are links into /proc."""
    return _OPEN({"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}.get(str(file), file), *args, **names)


_OPEN: Callable[..., object] = open


def _module(name: str) -> dict[str, object]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _execute(code: str, names: dict[str, object]) -> None:
    exec(compile(code, "main.py", "exec", dont_inherit=True), names)


def _execute_all(parts: Iterable[str], names: dict[str, object]) -> None:
    for part in parts:
        _execute(part, names)


def _finished(body: Callable[[], None]) -> int:
    """Run to the end as the interpreter would: exceptions to standard error, threads joined, exit functions called."""
    code = 0
    try:
        body()
    except SystemExit as error:
        code = _exit_code(error.code)
    except BaseException as error:
        if not isinstance(error, Ended):
            traceback.print_exception(error.with_traceback(_own_part(error)), limit=FRAMES)
        code = 1
    finish: Iterable[Callable[[], object]] = (
        vars(threading)["_shutdown"],  # as the interpreter does
        atexit._run_exitfuncs,
        sys.stdout.flush,
        sys.stderr.flush,
    )
    for step in finish:
        try:
            step()
        except BaseException as error:
            code = code or (_exit_code(error.code) if isinstance(error, SystemExit) else 120)
    return code


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _own_part(error: BaseException) -> types.TracebackType | None:
    """The traceback from the program's first line on."""
    part = error.__traceback__
    while part is not None and part.tb_frame.f_code.co_filename == __file__:
        part = part.tb_next
    return part


# ---- the answer


def _serve(parts: Sequence[str]) -> None:
    """Load an answer and serve its names. Its main block is not run: the name of its module is `solution`."""
    channel = socket.socket(fileno=DESCRIPTORS["channel"])
    names = _module("solution")
    peer = Peer(channel, frozenset(OPERATIONS) | {"names"})
    try:
        _execute_all(parts, names)
    except BaseException:
        channel.close()
        raise
    sys.stdout.flush()
    peer.objects.append(_Names(names))  # number 0: where tests look names up
    peer.serve()


class _Names:
    """The names that an answer has defined: `names[name]` is a list, empty where there is none."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self.names = names

    def __getitem__(self, name: str) -> list[object]:
        value = self.names.get(name, self)
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        return [] if value is self else ["value", value]


# ---- the tests


def _test(request: Mapping[str, object]) -> int:
    """Run tests, and write their outcome to the descriptor `result`."""
    channel = socket.socket(fileno=DESCRIPTORS["channel"])
    peer = Peer(channel, FOR_ANSWERS)
    tests, entry = request["tests"], request["entry"]
    assert isinstance(tests, list)
    outcome = _outcome(peer, str(request["setup"]), tests, str(entry) if entry else None)
    with os.fdopen(DESCRIPTORS["result"], "w") as file:
        json.dump(outcome, file)
    channel.close()  # the answer's process ends with it
    return 0


def _outcome(peer: Peer, setup: str, tests: list[Test], entry: str | None) -> Outcome:
    names = _module("__main__")
    number = 0
    reason, detail = "", ""
    setattr(unittest.TestProgram, "runTests", _run_tests)  # noqa: B010  in this process, for these tests
    try:
        _execute(_imports(setup), {"__name__": "setup"})  # first here: an answer's process ends where they fail
        _bind(peer, names, setup, tests, entry)
        _execute(_without_classes(setup), names)
        for number, test in enumerate(tests):  # noqa: B007  read after the loop
            before = set(names)
            _execute(test["code"], names)
            if test["type"] == "program":
                _call(peer, names, entry, before)
    except Ended:
        reason = "ended early"
    except SystemExit as error:
        reason = "" if _exit_code(error.code) == 0 else "test failed"
    except AssertionError as error:
        reason, detail = "test failed", _last_lines(error)
    except AnswerError as error:
        reason, detail = "error: exception of its own", _last_lines(error)
    except BaseException as error:
        own = _is_own(error, entry, [setup, *(test["code"] for test in tests)])
        reason, detail = OWN_FAULT if own else f"error: {type(error).__name__}", _last_lines(error)
    if peer.ended:
        reason = peer.ended
    elif not reason and not peer.calls:
        reason = "never called"
    return {"passed": not reason, "reason": reason, "detail": detail, "number": number}


def _bind(peer: Peer, names: dict[str, object], setup: str, tests: list[Test], entry: str | None) -> None:
    """Give the tests the names of the answer that they use, and a module `solution` that has them."""
    codes = [setup, *(test["code"] for test in tests)]
    used = dict.fromkeys(name for code in codes for name in _loaded(code))
    modules = {name for code in codes for name in _modules(code)}
    if entry:
        used[entry] = None
    table = Remote(peer, 0, "names")
    bound = dict[str, object]()
    # An answer's own `abs` or `len` would decide comparisons: it counts only where the tests call nothing else of it,
    # as its own `math` does not in `math.isclose`.
    for hidden in (False, True):
        for name in (name for name in used if hasattr(builtins, name) == hidden or name == entry):
            match table[name]:
                case ["value", value] if name in modules:
                    bound[name] = importlib.import_module(name)
                case ["value", value]:
                    bound[name] = value
                case ["module", str(path)]:
                    if (imported := _imported(name, path)) is not None:
                        bound[name] = imported
        if any(isinstance(value, Remote) for value in bound.values()):
            break
    names.update(bound)
    module = types.ModuleType("solution")
    module.__dict__.update(bound)
    sys.modules["solution"] = module


def _imported(name: str, module: str) -> types.ModuleType | None:
    """A module under the name by which an answer knows it; its own name first, so that `math` is `math`."""
    for candidate in (name, module):
        if candidate.partition(".")[0] in {*sys.stdlib_module_names, "numpy"}:
            return importlib.import_module(candidate)
    return None


def _loaded(code: str) -> Iterator[str]:
    """The names that code reads, and those that it imports from `solution`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            yield from (alias.name for alias in node.names)


def _is_own(error: BaseException, entry: str | None, codes: Iterable[str]) -> bool:
    """Whether an error of the tests says nothing of the answer: a module that is missing, a name that nobody defined.

    A name that the tests call, or whose attributes they read, is the answer's to define, unless it is a module's. An
    exception that the answer raised arrives without `name`.
    """
    match error:
        case SyntaxError(filename="main.py"):
            return True
        case ImportError(name=str(name)):
            return name.partition(".")[0] != "solution"
        case NameError(name=str(name)):
            return name != entry and not any(name in _expected_of_answer(code) for code in codes)
    return False


def _expected_of_answer(code: str) -> Iterator[str]:
    """The names that code uses as functions or as classes."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(func=ast.Name(id=name), args=arguments):
                yield name
                if hasattr(builtins, name):  # `map(square, numbers)`, `isinstance(x, Vector)`
                    yield from (argument.id for argument in arguments if isinstance(argument, ast.Name))
            case ast.Attribute(value=ast.Name(id=name)) if name not in MODULES:
                yield name


def _imports(setup: str) -> str:
    """The imports of a setup, without those from the answer."""
    tree = ast.parse(setup)
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "solution")
    ]
    return ast.unparse(tree)


def _modules(code: str) -> Iterator[str]:
    """The modules of the standard library of which code uses an attribute, as in `math.isclose`."""
    for node in ast.walk(ast.parse(code)):
        owner = node.value if isinstance(node, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id in sys.stdlib_module_names:
            yield owner.id


def _without_classes(setup: str) -> str:
    """The setup without the classes that the answer's process defines."""
    tree = ast.parse(setup)
    tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    return ast.unparse(tree)


def _call(peer: Peer, names: dict[str, object], entry: str | None, before: set[str]) -> None:
    """Call what a test program only defines: `check`, or functions named `test_…`."""
    check = names.get("check")
    if entry and "check" not in before and callable(check):
        check(names[entry])
        return
    if peer.calls:
        return
    for name, value in list(names.items()):
        if name in before:
            continue
        if name.startswith("test") and isinstance(value, types.FunctionType):
            value()
        elif isinstance(value, type) and issubclass(value, unittest.TestCase) and not peer.calls:
            unittest.main(exit=False, argv=["main.py"])


_RUN_TESTS = unittest.TestProgram.runTests


def _run_tests(program: unittest.TestProgram) -> None:
    """Run the tests of `unittest.main`, and fail where they fail: with `exit=False` it returns."""
    _RUN_TESTS(program)
    if not program.result.wasSuccessful():
        raise AssertionError(f"{len(program.result.failures)} failures, {len(program.result.errors)} errors")


def _last_lines(error: BaseException) -> str:
    try:
        lines = traceback.format_exception_only(error)
    except BaseException:  # the text of an assertion may ask the answer's process, which may have ended
        lines = [type(error).__name__]
    part = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(part) if frame.filename == "main.py"), None)
    where = f"line {place.lineno}: " if place else ""
    return f"{where}{''.join(lines).strip()}"[:2000]
