"""Seeded mutations of files, and commands that meet them: exit 2 with one line, redone, or no effect.

    python tests/mutations.py RECIPE FINISHED SCRATCH FIRST LAST

applies the mutations FIRST … LAST-1 to copies of the run directory FINISHED, runs a command on each, and prints a JSON
line for each outcome that is not allowed. Commands run in forks of one process that has imported everything, so that a
thousand of them start in the time of one; that process must not use torch itself, whose threads do not survive a fork.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

SECONDS = 60  # of processor time: a command that takes more hangs. Redoing everything takes some ten
PATIENCE = 600  # seconds on the clock, for a command that waits; many times what a busy machine needs
MEMORY = 2 << 30  # bytes

Mutation = Callable[[random.Random, bytes], bytes | None]  # None: the file is deleted


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    bit = rng.randrange(8 * len(changed))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    noise = rng.randbytes(rng.randint(1, 64))
    return data[:start] + noise + data[start + len(noise) :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def drop_a_line(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def repeat_a_line(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    place = rng.randrange(len(lines))
    return b"".join([*lines[: place + 1], lines[place], *lines[place + 1 :]])


def change_a_digit(rng: random.Random, data: bytes) -> bytes:
    digits = [i for i, byte in enumerate(data[: 1 << 20]) if 48 <= byte <= 57]
    if not digits:
        return flip_bit(rng, data)
    place = rng.choice(digits)
    return data[:place] + str(rng.randrange(10)).encode() + data[place + 1 :]


def replace(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([b"", b"[]", b"{}", b"null", b"\xff\xfe", b"a: [", b"[" * 10_000, b"\0" * len(data)])


def append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\n", b"{}\n", b'{"half": ', rng.randbytes(16)])


def delete(rng: random.Random, data: bytes) -> None:
    return None


MUTATIONS: Sequence[Mutation] = (
    *(flip_bit,) * 3,
    overwrite,
    truncate,
    drop_a_line,
    repeat_a_line,
    change_a_digit,
    replace,
    append,
    delete,
)


@dataclass
class Outcome:
    """What a command did: exit code (negative: a signal), processor seconds, peak bytes, what it printed."""

    code: int
    seconds: float
    memory: int
    output: str

    def problem(self) -> str | None:
        """Why this outcome is not allowed, whatever became of the files; None when it is."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        if "Traceback (most recent call last)" in self.output:
            return "traceback"
        if self.code < 0:
            return f"signal {-self.code}"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.0f} s"
        if self.memory > MEMORY:
            return f"took {self.memory / 2**20:.0f} MiB"
        if self.code not in (0, 2):
            return f"exit code {self.code}"
        if self.code == 2 and len(errors) != 1:
            return f"{len(errors)} lines of error"
        return None


def command(arguments: Sequence[str], output: Path) -> Outcome:
    """Run `distill ARGUMENTS` in a fork, which is killed when it hangs."""
    return forked(lambda: _distill(arguments), output)


def forked(work: Callable[[], None], output: Path) -> Outcome:
    """Call a function in a fork, whose stdout and stderr go to a file, and which is killed when it hangs."""
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(work, output)
    deadline = begun + PATIENCE
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.01)
    return Outcome(
        os.waitstatus_to_exitcode(status),
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss << 10,
        output.read_text(errors="replace"),
    )


def _distill(arguments: Sequence[str]) -> None:
    from distill.cli import main

    sys.argv = ["distill", *arguments]
    main()


def _child(work: Callable[[], None], output: Path) -> None:
    code = 70
    try:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass
class Applied:
    """One mutation as it was applied."""

    seed: int
    file: str
    kind: str
    kept_time: bool


def mutate(seed: int, root: Path, files: Sequence[Path]) -> Applied:
    """Change one of the files; half of the times with its modification time kept."""
    rng = random.Random(seed)
    path, mutation, keep = rng.choice(files), rng.choice(MUTATIONS), rng.random() < 0.5
    before = path.stat()
    data = mutation(rng, path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
        if keep:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return Applied(seed, str(path.relative_to(root)), mutation.__name__, keep)


def readers(run: str) -> list[list[str]]:
    """Commands that only read a run; each mutation meets one."""
    return [["report", run], ["traces", run, "--counts"], ["eval", "compare", run, run]]


def finished_run(recipe: Path, finished: Path, scratch: Path, seeds: range) -> int:
    """Mutate a finished run, repeat it, and compare what it holds with what it held.

    Prints the outcomes that are not allowed, and returns their number.
    """
    expected, failures = parts(finished, scratch / "expected"), 0
    for seed in seeds:
        run, output = scratch / f"run-{seed}", scratch / f"output-{seed}"
        shutil.copytree(finished, run, copy_function=shutil.copy2)
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
        applied = mutate(seed, run, files)
        arguments = ["run", str(recipe), "--run-dir", str(run)]
        commands = [arguments, readers(str(run))[seed % 3]]
        if applied.kept_time:  # neither size nor time may have changed: `--verify` looks at the content
            commands.append([*arguments, "--verify"])
        problem = None
        for asked in commands:
            result = command(asked, output)
            problem = problem or result.problem()
            if problem is not None:
                break
        if problem is None and result.code == 0:
            problem = difference(expected, parts(run, scratch / "parts"), run)
        if problem is not None:
            failures += 1
            print(json.dumps(asdict(applied) | {"problem": problem, "output": result.output[-3000:]}), flush=True)
        else:
            shutil.rmtree(run)
            output.unlink()
    return failures


def parts(run: Path, output: Path) -> dict[str, str]:
    """A digest of each part of what a run holds; of nothing when it cannot be read. Read in a fork, like all else."""

    def show() -> None:
        from test_kill import outcome

        for name, value in outcome(run).items():
            print(name, hashlib.sha256(repr(value).encode()).hexdigest())

    result = forked(show, output)
    if result.code != 0:
        return {"unreadable": result.output[-2000:]}
    return dict(line.split() for line in result.output.splitlines())  # type: ignore[misc]


def difference(expected: dict[str, str], found: dict[str, str], run: Path) -> str | None:
    """What differs of a run that a command called finished."""
    if not (run / "report.html").is_file():
        return "no report"
    if (why := found.get("unreadable")) is not None:
        return f"unreadable: {why}"
    return next((f"silent difference in {part}" for part in expected if expected[part] != found.get(part)), None)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "e2e"))
    import transformers  # noqa: F401  imported before the forks

    recipe, finished, scratch = map(Path, sys.argv[1:4])
    first, last = map(int, sys.argv[4:6])
    failures = finished_run(recipe, finished, scratch, range(first, last))
    print(json.dumps({"failures": failures, "of": last - first}))
    sys.exit(1 if failures else 0)
