"""Short programs a second in the sandbox: scripts with an input, and functions with asserts, in one zygote a core.

python perf/sandbox.py [--workers 2] [--programs 400]
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

from distill.grading.sandbox.levels import level_of, open_zygote
from distill.grading.sandbox.program import Test
from distill.grading.sandbox.runner import Sandbox

TEST = Test(type="assert", code="assert f(1) == 2")


def script(sandbox: Sandbox) -> None:
    """One program that reads a number and prints the next."""
    assert sandbox.script("print(int(input()) + 1)", b"41\n", 5.0).output == b"42\n"


def function(sandbox: Sandbox) -> None:
    """One function with an assert, in two processes."""
    assert sandbox.tests("def f(x): return x + 1", "", [TEST], None, 5.0)["passed"]


def main() -> None:
    """Print a line for each kind of program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=400)
    options = parser.parse_args()
    zygotes = [open_zygote() for _ in range(options.workers)]
    print(f"level {level_of(zygotes[0].powers)}, {options.workers} workers")
    sandboxes = [Sandbox(zygote) for zygote in zygotes]
    each = options.programs // options.workers
    for name, run in (("scripts", script), ("functions with asserts", function)):

        def share(sandbox: Sandbox, run=run) -> None:
            for _ in range(each):
                run(sandbox)

        start = time.perf_counter()
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(share, sandboxes))
        print(f"{name}: {each * options.workers / (time.perf_counter() - start):,.0f} a second")
    for zygote in zygotes:
        zygote.close()


if __name__ == "__main__":
    main()
