"""A comparison that never ends, a worker that dies, a parent that is killed: nothing hangs, nothing is left over.

No test here measures time: that it comes to its end is the proof.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import grading
from distill.children import Child
from distill.errors import UserError, WorkError
from distill.grading import GRADERS, Answer, Grader, TaskGrader, unreadable_golds
from distill.grading import grader as grader_module
from distill.grading.grade import Outcome
from distill.grading.pool import Lost, Worker, WorkerPool
from distill.prompts.prompt import Prompt

TOWER = "9^{9^{9^{9}}}"
SUM = "(a+b+c+d+f+g+h+k)"
TERMS = ["a", "b", "c", "d", "f", "g", "h", "k"]  # whose 39th power has 53 million terms when it is expanded
EXPANDED = "+".join(f"{SUM}^{{38}}{term}" for term in TERMS)
EASY = {"task": "math", "gold": "5", "answer": "10/2", "marked": True}
ENDLESS = {"task": "math", "gold": f"{SUM}^{{39}}", "answer": EXPANDED, "marked": True}
EQUAL = ["correct", "equal"]


def running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie that nobody has waited for."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_endless_comparison_is_killed_and_the_rest_is_graded() -> None:
    endless = (Prompt.from_question("q", f"{SUM}^{{39}}"), rf"\boxed{{{EXPANDED}}}")
    easy = (Prompt.from_question("q", "5"), r"\boxed{10/2}")
    items = [(i, *(endless if i in (1, 4) else easy)) for i in range(8)]
    with Grader(workers=2, timeout=1.0) as grader:
        grades = dict(grader.grade(items))
    assert {i: (g.verdict, g.reason) for i, g in grades.items()} == {
        i: ("unverifiable", "timeout") if i in (1, 4) else ("correct", "equal") for i in range(8)
    }
    assert grades[1].evidence["exit_code"] in (-signal.SIGXCPU, -signal.SIGKILL)


def test_the_same_tower_twice_is_correct_before_any_parser() -> None:
    with Grader(workers=1, timeout=1.0) as grader:
        [(_, grade)] = grader.grade([(0, Prompt.from_question("q", TOWER), rf"\boxed{{{TOWER}}}")])
    assert (grade.verdict, grade.reason) == ("correct", "identical")
    assert not grader.pool.workers


def test_workers_that_die_or_stand_still_cost_their_item_only() -> None:
    """One that stands still uses no processor time, so it is not the kernel's limit that ends it but the clock's."""
    for signal_number, timeout, expected in (
        (signal.SIGSEGV, 600.0, Lost("worker died", -signal.SIGSEGV)),
        (signal.SIGSTOP, 0.2, Lost("timeout", -signal.SIGKILL)),
    ):
        results: dict[Any, Any] = {}
        with WorkerPool(workers=1, timeout=timeout) as pool:
            items = [("bad", ENDLESS), ("good", EASY)]
            thread = threading.Thread(target=lambda p, r, i: r.update(p.map(i)), args=(pool, results, items))
            thread.start()
            while not (pool.workers and pool.workers[0].key == "bad"):
                time.sleep(0.001)
            pool.workers[0].child.process.send_signal(signal_number)
            thread.join()
        assert results == {"bad": expected, "good": EQUAL}


def test_a_worker_over_its_memory_dies_alone() -> None:
    huge = {"task": "math", "gold": "5", "answer": "x" * 40_000_000, "marked": True}
    with WorkerPool(workers=1, timeout=600, memory=120 << 20) as pool:
        results = dict(pool.map([("huge", huge), ("good", EASY)]))
    assert results["good"] == EQUAL
    assert isinstance(results["huge"], Lost) and results["huge"].reason == "worker died"


def test_items_are_read_as_workers_become_free_and_no_process_is_left_behind() -> None:
    read = []

    def items() -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(50):
            read.append(i)
            yield i, EASY

    with WorkerPool(workers=2, timeout=600) as pool:
        answers = pool.map(items())
        next(answers)
        assert len(read) <= 2 * pool.size
        answers.close()  # whoever stops listening in the middle…
        assert dict(pool.map((i, EASY) for i in range(100, 104))) == dict.fromkeys(
            range(100, 104), EQUAL
        )  # …starts anew
        pids = [worker.child.process.pid for worker in pool.workers]
        assert len(pids) == 2 and all(map(running, pids))
    assert not any(map(running, pids))


def test_a_killed_parent_leaves_no_endless_comparison_behind() -> None:
    script = f"""
import threading
from distill.grading.pool import WorkerPool
pool = WorkerPool(workers=1, timeout=1.0)
def tell():
    while not (pool.workers and pool.workers[0].key): pass
    print(pool.workers[0].child.process.pid, flush=True)
threading.Thread(target=tell).start()
list(pool.map([("tower", {ENDLESS!r})]))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    while running(pid):  # the kernel ends it, by its limit of processor time
        time.sleep(0.05)


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sympy.py").write_text("raise ImportError('sympy is broken here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool(workers=2, timeout=1.0) as pool, pytest.raises(WorkError, match="sympy is broken here"):
        list(pool.map([(0, EASY)]))


@pytest.mark.parametrize(("kills", "expected"), [(2, EQUAL), (3, Lost("worker died", -signal.SIGKILL))])
def test_an_item_whose_worker_is_killed_from_outside_is_asked_again(kills: int, expected: object) -> None:
    results: dict[str, object] = {}
    slow = EASY | {"answer": r"\sqrt{25}"}
    with WorkerPool[str](workers=1, timeout=600.0) as pool:
        send, left = Worker.send, kills

        def send_and_kill(worker: Worker[str], key: str, item: Any) -> None:
            nonlocal left
            if key == "bad" and left:
                left -= 1
                worker.child.process.send_signal(signal.SIGKILL)
                worker.child.process.wait()
            send(worker, key, item)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "send", send_and_kill)
            results.update(pool.map([("first", EASY), ("bad", slow), ("last", EASY)]))
        assert results == {"first": EQUAL, "bad": expected, "last": EQUAL} and not left


def test_the_worker_stays_light_and_ignores_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('the wrong json')\n")
    heavy = ["torch", "transformers", "datasets", "pyarrow", "pydantic", "rich"]
    script = f"""
import sys
from distill.grading.pool import WorkerPool
with WorkerPool(1, 600) as pool:
    print(*pool.map([(0, {EASY})]))
import distill.grading.worker, distill.grading.graders, sympy
print([module for module in {heavy} if module in sys.modules])
"""
    shown = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == ["(0, ['correct', 'equal'])", "[]"]


def test_golds_that_no_grader_can_read() -> None:
    golds = [r"\oint x\,dx", r"1 + 2 + \ldots + n", "the sum of all of its digits", r"3 \mid n", "", TOWER, r"\frac{"]
    readable = [
        "42",
        "-7",
        r"\frac{1}{2}",
        "x^2+1",
        "(1,2)",
        r"90^\circ",
        "yes",
        "90°",
        "€5",
        r"0.\overline{3}",
        "½",
        "5 apples and 3 pears",
        "12 dollars",
        r"The answer: \boxed{3}",
    ]
    with Grader(workers=2, timeout=1.0) as grader:
        found = dict(grader.readable((gold, "math", gold) for gold in golds + readable))
        letters = dict(grader.readable((gold, "choice", gold) for gold in ("B", "b", "4 mol")))
    assert [gold for gold in golds if found[gold]] == []
    assert [gold for gold in readable if not found[gold]] == []
    assert letters == {"B": True, "b": True, "4 mol": False}
    assert grading.readable("math", r"\sqrt{2}") and not grading.readable("math", r"3 \mid n")
    with pytest.raises(UserError, match="task 'chat' has no grader"):
        grading.readable("chat", "hello")


def test_unreadable_golds_are_counted_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [r"3 \mid n", "42", r"3 \mid n", None, r"\sum k", r"\frac{1}{2}"]
    prompts = [Prompt.from_question(f"q{i}", answer) for i, answer in enumerate(answers)]
    prompts.append(Prompt.from_question("q", "hello", "chat"))
    assert unreadable_golds(prompts, 1, 5.0) == ([r"3 \mid n", r"\sum k"], 4)
    monkeypatch.setattr(grader_module, "CHECKED", 2)
    assert unreadable_golds(prompts, 1, 5.0) == ([r"3 \mid n"], 2)
    monkeypatch.setattr(WorkerPool, "_start", lambda pool: pytest.fail("integers need no process"))
    assert unreadable_golds([Prompt.from_question(str(i), str(i)) for i in range(9)], 1, 5.0) == ([], 2)


class Echo(TaskGrader):
    """One file and one line: the answer is the whole response."""

    def gold(self, text: str) -> str:
        return text

    def find(self, response: str) -> Answer | None:
        return Answer(response, "whole") if response else None

    def rule(self, gold: str, answer: Answer) -> tuple[Outcome, str]:
        return ("correct", "the same") if gold == answer.text else ("wrong", "another text")

    def reads_plainly(self, gold: str) -> bool:
        return True


def test_a_grader_is_a_class_and_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRADERS, "chat", Echo())
    prompt = Prompt.from_question("Say hello.", "hello", "chat")
    with Grader(workers=1) as grader:
        grades = dict(grader.grade((text, prompt, text) for text in ("hello", "bye", "")))
    assert {text: (grade.verdict, grade.reason) for text, grade in grades.items()} == {
        "hello": ("correct", "the same"),
        "bye": ("wrong", "another text"),
        "": ("unverifiable", "no answer found"),
    }
    assert grades["bye"].evidence == {"extracted": "bye", "gold": "hello", "method": "whole"}


def test_a_child_speaks_in_lines_and_ends_with_its_input() -> None:
    child = Child("distill.grading.worker", [str(2 << 30), "600", "full"], detached=True)
    assert os.getsid(child.process.pid) == child.process.pid != os.getsid(0)
    messages: list[object] = []
    while not messages:
        messages += child.receive() or []
    child.send(EASY)
    child.send({"task": "math", "gold": r"3 \mid n"})
    while len(messages) < 3:
        messages += child.receive() or []
    assert messages == [{"ready": True}, EQUAL, False]
    child.stdin.close()
    assert child.receive() is None
    assert child.end(dying=True) == 0


def test_a_silent_child_writes_where_its_parent_does(tmp_path: Path) -> None:
    (tmp_path / "shout.py").write_text("import os, sys; print(os.environ['WORD']); sys.exit(3)\n")
    script = f"""
from distill.children import Child
child = Child("shout", environment={{"WORD": "hello", "PYTHONPATH": {str(tmp_path)!r}}}, speaks=False)
print(child.process.wait(), child.stdout, child.end())
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split("\n")[:2] == ["hello", "3 None 3"]


def test_a_child_that_fails_leaves_its_last_words() -> None:
    child = Child("distill.no_such_module")
    assert child.receive() is None
    assert child.last_words().endswith("No module named distill.no_such_module")
    assert child.end(dying=True) == 1
