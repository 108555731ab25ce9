"""Verdicts of programs that do something unusual: what a plain process would give, and no more for a cheat."""

import pytest

from distill.grading.code import run_tests
from distill.grading.sandbox.runner import Sandbox
from distill.prompts.code_tests import Case


def ruling(sandbox: Sandbox, code: str, case: Case, seconds: float = 1.0) -> tuple[str, str]:
    outcome, reason, *_ = run_tests(sandbox, code, {"language": "python", "test_cases": [case]}, seconds)
    return outcome, reason


SUM = "print(sum(map(int, {})))"
SCRIPTS = {  # the input is "1 2", the output 3
    "exit": ("print(3)\nexit()", "correct"),
    "quit with a code": ("print(3)\nquit(0)", "correct"),
    "exit with a failure": ("print(3)\nexit(1)", "exit code 1"),
    "exit with a text": ("print(3)\nimport sys\nsys.exit('ValueError: no')", "exit code 1"),
    "an exception at the end": ("print(3)\nraise ValueError", "error: ValueError"),
    "not flushed": ("import os\nprint(3)\nos._exit(0)", "wrong output"),
    "flushed": ("import os\nprint(3, flush=True)\nos._exit(0)", "correct"),
    "carriage return": ("print(3, end='\\r\\n')", "correct"),
    "no newline": ("print(3, end='')", "correct"),
    "a zero byte": ("print('3\\0')", "wrong output"),
    "no UTF-8": ("import sys\nsys.stdout.buffer.write(b'3\\xff')", "wrong output"),
    "standard output is closed": ("import os\nos.close(1)\nprint(3)", "exit code 120"),
    "standard error is closed": ("import os\nos.close(2)\nprint(3)", "correct"),
    "kills itself": ("import os\nprint(3, flush=True)\nos.kill(os.getpid(), 9)", "crash: SIGKILL"),
    "terminates itself": ("import os\nprint(3, flush=True)\nos.kill(os.getpid(), 15)", "crash: SIGTERM"),
    "aborts": ("import os\nprint(3, flush=True)\nos.abort()", "crash: SIGABRT"),
    "floods standard error": (
        "import sys\nprint(3)\nfor i in range(100): sys.stderr.write('x' * (1 << 20))",
        "output limit",
    ),
    "a prompt": ("a, b = input('? ').split()\nprint(int(a) + int(b))", "wrong output"),
    "reads past the end": ("input()\nprint(3)\ninput()", "error: EOFError"),
    "open(0)": (SUM.format("open(0).read().split()"), "correct"),
    "/dev/stdin": (SUM.format("open('/dev/stdin').read().split()"), "correct"),
    "bytes": ("import sys\n" + SUM.format("sys.stdin.buffer.read().split()"), "correct"),
    "a main block": ("if __name__ == '__main__' and __file__:\n print(3)", "correct"),
    "deep recursion in a thread": (
        "import sys, threading\nsys.setrecursionlimit(10**7)\nthreading.stack_size(1 << 27)\n"
        "def g(n): return n and 1 + g(n - 1)\n"
        "t = threading.Thread(target=lambda: print(g(50000) - 49997))\nt.start()\nt.join()",
        "correct",
    ),
    "endless recursion": ("def g(n): return g(n + 1)\ng(0)", "error: RecursionError"),
    "a number with too many digits": ("print(10**5000)", "error: ValueError"),
    "a daemon thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nprint(3)",
        "correct",
    ),
    "no imports": ("d = defaultdict(int)\nd[1] += 3\nprint(d[1], file=sys.stdout)", "correct"),
    "imports of its own": (
        "from __future__ import annotations\nfrom datetime import datetime\nprint(datetime.max.year - 9996)",
        "correct",
    ),
    "deep recursion": ("def g(n): return n and 1 + g(n - 1)\nprint(g(5000) - 4997)", "correct"),
    "an exit function": ("import atexit\natexit.register(print, 3)", "correct"),
    "grows its output": ("import os\nprint(3, flush=True)\nos.ftruncate(1, 60 << 20)", "wrong output"),
    "a directory without rights": ("import os\nos.mkdir('a')\nos.chmod('a', 0)\nprint(3)", "correct"),
    "every inode": ("i = 0\nwhile True:\n open(str(i), 'w')\n i += 1", "file limit"),
    "a pipe": ("import os\nos.mkfifo('x')\nopen('x')", "error: PermissionError"),
    "tracing": ("import sys\nsys.settrace(lambda *a: None)\nprint(3)", "correct"),
    "its frames": (
        "import sys\nf = sys._getframe()\nwhile f:\n"
        " if 'expected' in repr(list(f.f_locals)) + repr(list(f.f_globals)): print(3)\n f = f.f_back",
        "wrong output",
    ),
    "its descriptors": (
        "import os\nfor n in range(3, 1024):\n try: os.fstat(n)\n except OSError: continue\n print(n)\nprint(3)",
        "correct",
    ),
    "pretends to have failed to start": (
        "import os\nos.write(2, b'sandbox: OSError: no')\nos._exit(97)",
        "exit code 97",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(sandbox: Sandbox, name: str) -> None:
    code, expected = SCRIPTS[name]
    outcome, reason = ruling(sandbox, code, {"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"})
    assert (reason if outcome == "wrong" else outcome) == expected


ASSERTS = {
    "keywords": ("def f(a, b=2): return a - b", "assert f(b=1, a=3) == 2", True),
    "a keyword of the caller's": ("def f(operation, self=0): return operation", "assert f(operation=3) == 3", True),
    "a named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, 2)",
        "assert f(1) == (1, 2) == P(1, 2) and f(1).y == 2",
        True,
    ),
    "an exception of its own": (
        "class E(Exception): pass\ndef f(x): raise E('no')",
        "try: f(1)\nexcept E as e: assert str(e) == 'no'\nelse: assert False",
        True,
    ),
    "another exception": (
        "class E(Exception): pass\ndef f(x): raise KeyError('no')",
        "try: f(1)\nexcept E: pass",
        False,
    ),
    "numpy scalars": ("import numpy as np\ndef f(x): return np.float64(x) / 2", "assert f(9) == 4.5", True),
    "a numpy array": (
        "import numpy as np\ndef f(x): return np.arange(x)",
        "import numpy as np\nassert np.allclose(f(3), [0, 1, 2])",
        True,
    ),
    "a match": ("import re\ndef f(x): return re.match('a', x)", "assert f('ab').group(0) == 'a' and not f('b')", True),
    "a main block": ("def f(x): return x\nif __name__ == '__main__':\n exit()", "assert f(1) == 1", True),
    "exit at the end": ("def f(x): return 1\nexit()", "assert f(1) == 1", False),
    "a list that counts as another": (
        "class A(list):\n __eq__ = lambda a, b: True\n __iter__ = lambda a: iter([1])\n__len__ = lambda a: 1\n"
        "def f(x): return A()",
        "assert f(1) == [1]",
        False,
    ),
    "a dict that counts as another": (
        "class A(dict):\n __eq__ = lambda a, b: True\n items = lambda a: [(1, 2)]\ndef f(x): return A()",
        "assert f(1) == {1: 2}",
        False,
    ),
    "a class that is int": (
        "class A:\n __class__ = int\n __index__ = lambda a: 5\n __eq__ = lambda a, b: True\ndef f(x): return A()",
        "assert f(1) == 5",
        False,
    ),
    "a named tuple that counts as another": (
        "class A(tuple):\n _fields = ('x',)\n __eq__ = lambda a, b: True\ndef f(x): return A([1])",
        "assert f(1) == (2,)",
        False,
    ),
    "fields that are no names": (
        "class A(tuple):\n _fields = ('x=1): import os #',)\ndef f(x): return A([1])",
        "assert f(1) == (1,)",
        False,
    ),
    "never unequal": ("class A:\n __ne__ = lambda a, b: False\ndef f(x): return A()", "assert not f(1) != 5", False),
    "contains everything": (
        "class A:\n __contains__ = lambda a, b: True\ndef f(x): return A()",
        "assert 5 in f(1)",
        False,
    ),
    "less than everything": (
        "class A:\n __lt__ = __gt__ = lambda a, b: True\ndef f(x): return A()",
        "assert 0 < f(1) < 5",
        False,
    ),
    "a key": (
        "class A:\n __hash__ = lambda a: hash(5)\n __eq__ = lambda a, b: True\ndef f(x): return A()",
        "assert {5: 1}[f(1)]",
        False,
    ),
    "no number equals itself": ("def f(x): return float('nan')", "assert f(1) == f(1)", False),
    "its own math": (
        "class math:\n isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 5",
        "assert math.isclose(f(1), 2)",
        False,
    ),
    "math that is patched": (
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 5",
        "assert math.isclose(f(1), 2)",
        False,
    ),
    "sorted of its own": ("def sorted(x): return [1]\ndef f(x): return [2]", "assert sorted(f(1)) == [1]", False),
    "its frames": (
        "import sys\ndef f(x):\n r = sys._getframe()\n while r:\n"
        "  if 'ass' + 'ert' in repr(r.f_locals): return 2\n  r = r.f_back\n return 5",
        "assert f(1) == 2",
        False,
    ),
    "nested too deep": ("def f(x):\n r = []\n for _ in range(10**5): r = [r]\n return r", "assert f(1) == 2", False),
    "holds itself": ("def f(x):\n r = []\n r.append(r)\n return r", "assert f(1) == 2", False),
}


@pytest.mark.parametrize("name", ASSERTS)
def test_asserts(sandbox: Sandbox, name: str) -> None:
    code, test, passed = ASSERTS[name]
    outcome, reason = ruling(sandbox, code, {"type": "assert", "code": test})
    assert outcome == ("correct" if passed else "wrong"), reason


CASES = "import unittest\nclass T(unittest.TestCase):\n def test_it(self): self.assertEqual(f(1), 2)\n"


@pytest.mark.parametrize(
    "end", ["", "unittest.main()", "unittest.main(exit=False)", "def test_more(): assert f(2) == 3"]
)
def test_unittest_fails_where_it_reports_a_failure(sandbox: Sandbox, end: str) -> None:
    test = Case(type="program", code=CASES + end)
    assert ruling(sandbox, "def f(x): return x + 1", test)[0] == "correct"
    for wrong in ("def f(x): return 5", "import unittest\nunittest.TestCase.assertEqual = print\ndef f(x): return 5"):
        assert ruling(sandbox, wrong, test)[0] == "wrong"


@pytest.mark.parametrize(
    ("name", "code", "outcome"),
    [
        (
            "f",
            "class Solution:\n def f(self, a: List[int]) -> Optional[int]: return heapq.nsmallest(1, a)[0]",
            "correct",
        ),
        ("f", "def f(a): return pow(3, 1, 2)", "correct"),
        ("f", "class Solution:\n @staticmethod\n def f(a): return a[1]", "correct"),
        ("f", "class Solution:\n def __init__(self, x): pass\n def f(self, a): return 1", "wrong"),
        ("prod", "class Solution:\n def prod(self, a): return 1", "correct"),
        ("min", "x = 1", "wrong"),
        ("gcd", "x = 1", "wrong"),
        ("f", "def f(a): return True", "correct"),
        ("f", "def f(a): return deepcopy(a)[1]", "correct"),
        ("f", "def f(a, n=5000): return f(a, n - 1) if n else 1", "correct"),
        ("f", "class A:\n __eq__ = lambda a, b: True\ndef f(a): return A()", "wrong"),
        ("f", "import os\ndef f(a): os._exit(0)", "wrong"),
        ("f", "import numpy as np\ndef f(a): return np.int64(1)", "correct"),
        ("f", "def f(a):\n print('noise')\n return 1", "correct"),
    ],
)
def test_calls(sandbox: Sandbox, name: str, code: str, outcome: str) -> None:
    case = Case(type="function_call", fn_name=name, input=[[2, 1]], output=1)
    assert ruling(sandbox, code, case)[0] == outcome


def test_a_result_that_is_too_long_is_refused(sandbox: Sandbox) -> None:
    code = "def f(a): return 'a' * (70 << 20)"
    for case in (
        Case(type="function_call", fn_name="f", input=[1], output=1),
        Case(type="assert", code="assert f(1) == 1"),
    ):
        assert ruling(sandbox, code, case, 6.0) == ("wrong", "output limit")
