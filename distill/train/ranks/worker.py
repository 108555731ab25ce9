"""One rank of a training that `ranks.launch` started: `python -m distill.train.ranks.worker RUN_DIRECTORY OUTCOME`.

OUTCOME is a file for the parent: the stage's summary with exit code 0, or the error's line with 1 or 2. The process
exits when its parent dies, which closes its standard input.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from distill.artefacts import Artefact
from distill.errors import UserError, WorkError

INTERRUPTED = 130


class Failure(Artefact):
    """The line of an error."""

    message: str


def end_with_parent() -> None:
    """Exit when standard input ends."""
    while os.read(0, 1):  # nothing is ever sent
        pass
    os._exit(1)


def main() -> int:
    """Train as one rank; returns the exit code."""
    directory, outcome = map(Path, sys.argv[1:])
    threading.Thread(target=end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # until the loop installs handlers of its own: an import may swallow
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))  # a KeyboardInterrupt, and nothing is held yet
    try:
        from distill.catalog import load_recipe  # importing torch takes seconds, and may be interrupted too
        from distill.train.ranks.join import train_rank

        train_rank(load_recipe(str(directory / "recipe.yaml")), directory).write(outcome)
    except (UserError, WorkError) as error:
        Failure(message=str(error)).write(outcome)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a regular exit would wait for ranks that died
