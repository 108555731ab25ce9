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

from distill.errors import WorkError
from distill.grading import Grader
from distill.grading.pool import Lost, WorkerPool
from distill.prompts.prompt import Prompt

TOWER = "9^{9^{9^{9}}}"
EASY = {"gold": "5", "answer": "10/2", "marked": True}
ENDLESS = {"gold": "5", "answer": TOWER, "marked": True}
EQUAL = ["correct", "equal"]


def running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie that nobody has waited for."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_power_tower_is_killed_and_the_rest_is_graded() -> None:
    prompt = Prompt.from_question("q", "5")
    items = [(i, prompt, rf"\boxed{{{TOWER if i in (1, 4) else '10/2'}}}") for i in range(8)]
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
            pool.workers[0].process.send_signal(signal_number)
            thread.join()
        assert results == {"bad": expected, "good": EQUAL}


def test_a_worker_over_its_memory_dies_alone() -> None:
    huge = {"gold": "5", "answer": "x" * 40_000_000, "marked": True}
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
        pids = [worker.process.pid for worker in pool.workers]
        assert len(pids) == 2 and all(map(running, pids))
    assert not any(map(running, pids))


def test_a_killed_parent_leaves_no_endless_comparison_behind() -> None:
    script = f"""
import threading
from distill.grading.pool import WorkerPool
pool = WorkerPool(workers=1, timeout=1.0)
def tell():
    while not (pool.workers and pool.workers[0].key): pass
    print(pool.workers[0].process.pid, flush=True)
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
    (tmp_path / "math_verify.py").write_text("raise ImportError('math-verify is broken here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool(workers=2, timeout=1.0) as pool, pytest.raises(WorkError, match="math-verify is broken here"):
        list(pool.map([(0, EASY)]))


def test_the_worker_stays_light_and_ignores_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('the wrong json')\n")
    heavy = ["torch", "transformers", "datasets", "pyarrow", "pydantic", "rich"]
    script = f"""
import sys
from distill.grading.pool import WorkerPool
with WorkerPool(1, 600) as pool:
    print(*pool.map([(0, {EASY})]))
import distill.grading.worker, math_verify
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
