"""One rank of a training that `train.launch` started: `python -m distill.train.worker RUN_DIRECTORY OUTCOME_FILE`.

The outcome is the stage's summary, or the one line that went wrong and its exit code; the parent reads it. A parent
that dies closes this process's input, which ends it.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from distill.errors import UserError, WorkError


def end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever sent
        pass
    os._exit(1)


def main() -> int:
    directory, outcome = map(Path, sys.argv[1:])
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training has handlers of its own
    try:
        from distill.catalog import load_recipe  # torch takes seconds, in which an interruption may come, too
        from distill.train.ranks import train_rank

        outcome.write_text(
            json.dumps({"summary": train_rank(load_recipe(str(directory / "recipe.yaml")), directory).to_json()})
        )
    except (UserError, WorkError) as error:
        code = 2 if isinstance(error, UserError) else 1
        outcome.write_text(json.dumps({"message": str(error), "code": code}))
        return code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a rank whose partner died would wait for it while it tidies up
