"""Trainings on rollouts of the tiny pair that take seconds, and ways to kill them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.artefacts import TrainSummary
from distill.recipe import Recipe
from distill.run import Run

# At this temperature the base's answers differ in length and correctness, so that groups have variance.
SAMPLING = {"temperature": 1.6, "max_new_tokens": 12}
GRPO = {"kind": "grpo", "rewards": {"correct": 1.0, "length": 1.0}}
ON_POLICY = {"kind": "on_policy", "top_k": 8}
TIMES = ("tokens_per_second", "crc32", "seconds_sync", "seconds_rollouts", "seconds_scoring")


def make_recipe(
    objective: dict[str, Any], rollouts: dict[str, Any] | None = None, student: str = "tiny-qwen", **train: Any
) -> Recipe:
    """Four prompts a set, four samples each. A student directory is named by its path."""
    given = {"prompts_per_step": 4, "samples": 4, "sampling": SAMPLING} | (rollouts or {})
    small = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "max_length": 128,
        "dtype": "float32",
        "logging_steps": 1,
        "save_steps": 2,
    }
    return Recipe.model_validate(
        {
            "name": "rollouts",
            "teacher": "tiny-r1",
            "student": student,
            "prompts": [{"kind": "procedural", "name": "arithmetic", "split": "train", "limit": 18}],
            "engine": {"dtype": "float32"},
            "train": small | train | {"objective": objective | {"rollouts": given}},
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )


def train(directory: Path, recipe: Recipe) -> TrainSummary:
    """Train in this process, as `distill train` does."""
    from distill.train import STAGE

    with Run(directory, recipe) as run:
        return STAGE.perform(run)


def dying(place: tuple[str, str], calls: int, after: bool = True) -> None:
    """Make this process kill itself at the given call of a method, named by module:class and method."""
    import importlib

    where, name = place
    module, _, owner = where.partition(":")
    target: Any = importlib.import_module(module)
    target = getattr(target, owner) if owner else target
    method: Callable[..., Any] = getattr(target, name)
    made = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if made == calls and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*args, **kwargs)
        if made == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, name, counted)


def victim(directory: Path, recipe_json: str, place: tuple[str, str] | None, calls: int, after: bool) -> None:
    """What a process does that is to be killed, or with `place` None is not."""
    if place is not None:
        dying(place, calls, after)
    train(directory, Recipe.model_validate_json(recipe_json))


def log(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of the log, without what depends on the clock."""
    path = directory / "checkpoints" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def rollouts(directory: Path) -> list[Any]:
    """Every stored rollout, in the order of their keys."""
    from distill.traces.store import TraceStore

    return sorted(TraceStore(directory / "rollouts"), key=lambda trace: (trace.sample, trace.prompt.id))


def rewards(directory: Path) -> dict[Any, Any]:
    """The stored reward of every rollout, by its key."""
    from distill.traces.rewarded import REWARDS, read_rewards

    rewarded = dict(read_rewards(directory / "rollouts" / REWARDS))
    assert rewarded.keys() == {trace.key for trace in rollouts(directory)}
    return rewarded


def weights(directory: Path) -> bytes:
    """The student's weights."""
    return (directory / "student" / "model.safetensors").read_bytes()
