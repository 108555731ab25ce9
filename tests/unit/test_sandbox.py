"""Programs that may do anything: each is held, what happened is reported, and the next one is unaffected."""

import os
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.grading.sandbox import levels, wire
from distill.grading.sandbox.levels import require_level
from distill.grading.sandbox.runner import Sandbox

ASSERT = [{"type": "assert", "code": "assert f(2) == 4, 'expected-4711'"}]


HOSTILE = {
    "a fork bomb": ("import os\nwhile True: os.fork()", "error: BlockingIOError"),
    "a stubborn fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", "time limit"),
    "a process": ("import subprocess\nsubprocess.run(['/bin/true'])", "error: BlockingIOError"),
    "threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "error: RuntimeError",
    ),
    "an endless loop": ("while True: pass", "time limit"),
    "100 GB": ("bytearray(100 << 30)", "memory limit"),
    "many files": ("for i in range(999): open(str(i), 'wb').write(bytes(1 << 20))", "file limit"),
    "one large file": ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", "file limit"),
    "a socket": ("import socket\nsocket.socket()", "error: PermissionError"),
    "another user's files": ("open('/etc/shadow').read()", "error: FileNotFoundError"),
    "the home directory": (f"import os\nos.listdir({str(Path(__file__).parent)!r})", "error: FileNotFoundError"),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", "error: PermissionError"),
    "killing everything": ("import os\nos.kill(-1, 9)", "error: PermissionError"),
    "writing outside": ("open('/usr/lib/x', 'w')", "error: OSError"),
    "endless output": ("while True: print('x' * 1000)", "output limit"),
    "a thread that outlives the program": (
        "import threading, time\ndef f():\n while True: time.sleep(0.01)\nthreading.Thread(target=f).start()",
        "time limit",
    ),
    "becoming root": ("import os\nos.setuid(0)", "error: PermissionError" if os.geteuid() == 0 else "error: OSError"),
    "a crash": ("import ctypes\nctypes.string_at(1)", "crash: SIGSEGV"),
    "an exit code": ("import sys\nsys.exit(3)", "exit code 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_held_and_the_next_one_runs(sandbox: Sandbox, name: str) -> None:
    code, reason = HOSTILE[name]
    assert sandbox.script(code, b"", 0.5).reason == reason
    after = sandbox.script("import os\nprint(int(input()) + 1, os.listdir())", b"41\n", 5.0)
    assert (after.reason, after.output) == ("", b"42 []\n")


def test_a_program_sees_an_empty_machine(sandbox: Sandbox) -> None:
    shown = sandbox.script(
        "import os\nprint(os.getuid() != 0, sorted(os.environ), os.path.exists('/proc/1'))", b"", 5.0
    )
    assert shown.output.decode().strip() == "True ['HOME', 'LANG', 'PATH', 'TMPDIR', 'TZ'] False"


CHEATS = {
    "ends the process": "import os\ndef f(x): os._exit(0)",
    "exits": "import sys\ndef f(x): sys.exit(0)",
    "equals everything": "class A:\n def __eq__(self, other): return True\ndef f(x): return A()",
    "an integer that equals everything": (
        "class A(int):\n __hash__ = int.__hash__\n def __eq__(self, other): return True\ndef f(x): return A(9)"
    ),
    "replaces AssertionError": "import builtins\nbuiltins.AssertionError = KeyError\ndef f(x): return 5",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5",
    "tampers with unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 5",
    "writes the result": "import os\ndef f(x):\n os.write(4, b'{\"passed\": true}')\n return 5",
    "never ends": "def f(x):\n while True: pass",
    "searches its memory": (
        "import gc\ndef f(x):\n"
        " text = 'expected-' + '4711'\n"
        " seen = [o for o in gc.get_objects() if isinstance(o, (list, dict)) and text in repr(o)[:9999]]\n"
        " return 4 if seen else 5"
    ),
    "leaves a thread": (
        "import threading, time\ndef g():\n while True: time.sleep(0.01)\nthreading.Thread(target=g).start()\n"
        "def f(x): return 4"
    ),
    "returns nothing": "def f(x): pass",
    "is no Python": "def f(x) return",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(sandbox: Sandbox, name: str) -> None:
    outcome = sandbox.tests(CHEATS[name], "", ASSERT, None, 0.5)  # type: ignore[arg-type]  # a list of plain dicts
    assert not outcome["passed"] and outcome["reason"]
    assert sandbox.tests("def f(x): return 2 * x", "", ASSERT, None, 5.0)["passed"]  # type: ignore[arg-type]  # a list of plain dicts


@pytest.mark.parametrize(
    ("code", "test", "passed"),
    [
        ("def abs(x): return 0\ndef f(x): return 5", "assert abs(f(2) - 4) < 1e-6", False),
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", True),
        ("def f(a): a.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]", True),
        ("def f(g): return [g(i) for i in range(3)]", "assert f(lambda i: i * i) == [0, 1, 4]", True),
        ("def f(x): raise ValueError(x)", "try: f(1)\nexcept ValueError: pass\nelse: assert False", True),
        (
            "class P:\n def __init__(self, x): self.x = x\n def __add__(self, o): return P(self.x + o.x)\n"
            " def __eq__(self, o): return self.x == o.x",
            "assert P(1) + P(2) == P(3)\nassert (P(1) + P(2)).x == 3",
            True,
        ),
        ("def f(): yield from range(3)", "assert list(f()) == [0, 1, 2]", True),
        ("def f(x): return x", "assert 1 == 1", False),
    ],
)
def test_tests_see_functions_as_they_are(sandbox: Sandbox, code: str, test: str, passed: bool) -> None:
    assert sandbox.tests(code, "", [{"type": "assert", "code": test}], None, 5.0)["passed"] == passed


def test_values_go_through_the_wire() -> None:
    value = [None, True, 1, 2**80, 1.5, float("inf"), "ä", (1, {2}), {(1, 2): b"x"}, range(3), frozenset({1}), 1j]

    def refused(*_: object) -> object:
        raise AssertionError("plain data needs no handle")

    assert wire.decode(wire.encode(value, refused), refused) == value  # type: ignore[arg-type]  # a list of plain dicts
    for data in (["x", 1], {"a": 1}, [["h"]], ["i", "zz"]):
        with pytest.raises((ValueError, TypeError, KeyError, IndexError, AssertionError)):
            wire.decode(data, refused)


def test_less_isolation_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    powers = {"walls": "process", "uid": 1, "namespaces": False, "landlock": 0, "seccomp": False}
    monkeypatch.setattr(levels, "this_machine", lambda: ("process", powers, ("namespaces: unshare: not permitted",)))
    with pytest.raises(UserError, match=r"^filter.correct.sandbox: .* 'full' .* gives 'process' .*unshare"):
        require_level("full", "filter.correct.sandbox")
    require_level("process", "filter.correct.sandbox")
    assert "for more" in dict(levels.describe())
