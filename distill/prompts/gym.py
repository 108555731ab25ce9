"""Problems of reasoning-gym, whose generators score answers themselves.

A problem is named by (dataset, config, seed, index), from which the generator makes it anew: that name is the prompt's
gold, as JSON text, with the reference answer and a hash of the question:

    {"dataset": "chain_sum", "config": {}, "seed": 42, "index": 7, "question": "9f2c…", "answer": "12"}

The metadata that `score_answer` reads is made again and not stored: it holds tuples, sets and integer keys, which JSON
would change without an error, and for some datasets is larger than a trace. Another version of reasoning-gym may make
another problem of the same name; then question or answer differ from the gold, and the grade is `unverifiable`.

Some generators iterate over sets of text, so their problems depend on the process's hash seed. Problems are therefore
made in a process of their own with `PYTHONHASHSEED=0` (so are the grading workers), which also keeps what generators
print out of this one's output. `composite` is refused, because a mixture is what `weight` is for, and `acre`, because
its problems change with their number, so that a longer list would not extend a shorter one.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypedDict, cast

from distill.errors import UserError, WorkError
from distill.prompts.prompt import Prompt

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
REFUSED = {
    "composite": "name each of its datasets as a source with a `weight`",
    "acre": "its problems change with their number, so that a raised `limit` would replace the earlier ones",
}


class Gold(TypedDict):
    """The gold of a problem. question: 16 hex digits of the question's hash; answer: the reference one, if any."""

    dataset: str
    config: dict[str, object]
    seed: int
    index: int
    question: str
    answer: str | None


class Entry(TypedDict):
    """A problem as reasoning-gym makes it."""

    question: str
    answer: str | None
    metadata: dict[str, object]


class GymDataset(Protocol):
    """The part of reasoning-gym's datasets that is used."""

    def __getitem__(self, index: int) -> Entry:
        """Make problem `index`."""

    def score_answer(self, answer: str | None, entry: Entry) -> float:
        """Score an answer from 0 to 1."""


def require_gym(where: str) -> None:
    """Raise UserError when reasoning-gym is not installed."""
    if find_spec("reasoning_gym") is None:
        raise UserError(f"{where}: reasoning-gym is not installed; run `pip install distill[gym]`")


def read_gym(name: str, config: Mapping[str, object], seed: int, limit: int) -> Iterator[Prompt]:
    """The first `limit` problems of a dataset. Errors: UserError for an unknown dataset or a config that it refuses."""
    where = f"reasoning_gym {name}"
    require_gym(where)
    if name in REFUSED:
        raise UserError(f"{where}: not usable here; {REFUSED[name]}")
    asked = {"dataset": name, "config": config, "seed": seed, "limit": limit}
    path = os.pathsep.join(filter(None, (PACKAGE_PARENT, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "distill.prompts.gym", json.dumps(asked)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
    ) as process:
        output, errors = process.communicate()
    lines = output.decode().splitlines()
    if process.returncode != 0:
        words = (errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise WorkError(f"{where}: the generator failed ({words}); nothing was written")
    for line in lines:
        made = json.loads(line)
        if "refused" in made:
            raise UserError(f"{where}: {made['refused']}")
        yield Prompt.from_question(made["question"], made["gold"], "gym", f"reasoning_gym/{name}")


def read_gold(text: str) -> Gold | None:
    """The gold of a problem from its JSON text; None for any other text."""
    try:
        gold = json.loads(text)
    except ValueError:
        return None
    if not isinstance(gold, dict) or gold.keys() != Gold.__annotations__.keys():
        return None
    return cast(Gold, gold)


def question_hash(question: str) -> str:
    """16 hex digits over a question."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


@lru_cache(maxsize=32)
def _dataset(name: str, config: str, seed: int, size: int) -> GymDataset:
    import reasoning_gym

    return cast(GymDataset, reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(config)))


def entry_of(gold: Gold) -> tuple[GymDataset, Entry] | None:
    """The problem made anew, with its dataset; None where this version of reasoning-gym makes another one."""
    size = 1 << (gold["index"]).bit_length()  # few sizes, so that problems share a dataset
    dataset = _dataset(gold["dataset"], json.dumps(gold["config"], sort_keys=True), gold["seed"], size)
    entry = dataset[gold["index"]]
    same = question_hash(entry["question"]) == gold["question"] and entry["answer"] == gold["answer"]
    return (dataset, entry) if same else None


def _main(asked: Mapping[str, object]) -> None:
    """Write the problems that are asked for as JSON lines, or one line that says why not."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a generator prints is no problem
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, config = str(asked["dataset"]), asked["config"]
    seed, limit = asked["seed"], asked["limit"]
    assert isinstance(config, dict) and isinstance(seed, int) and isinstance(limit, int)
    if name not in DATASETS:
        refused = f"no such dataset; reasoning-gym {reasoning_gym.__version__} has {', '.join(sorted(DATASETS))}"
        print(json.dumps({"refused": refused}), file=output)
        return
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=limit, **config)
    except (TypeError, ValueError, AssertionError) as error:  # so it refuses a config
        known = sorted(DATASETS[name][1].__annotations__.keys() - {"seed", "size"})
        reason = " ".join(str(error).split())
        print(json.dumps({"refused": f"`config` is refused ({reason}); its keys are {', '.join(known)}"}), file=output)
        return
    for index in range(limit):
        entry = dataset[index]
        gold: Gold = {
            "dataset": name,
            "config": config,
            "seed": seed,
            "index": index,
            "question": question_hash(entry["question"]),
            "answer": entry["answer"],
        }
        print(json.dumps({"question": entry["question"], "gold": json.dumps(gold, ensure_ascii=False)}), file=output)
    output.flush()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
