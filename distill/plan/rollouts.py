"""What a training whose rows the student writes takes beside the training: sampling, scoring, disk.

    rollouts   sets × prompts × samples completions, at the rate at which the student decodes
    scoring    one pass of the teacher over prompts and completions (a prefill), of the base where the objective has a
               KL term, and the graders
    train      the same tokens once, but those of groups without variance, which `grpo` skips
    answers    of the base itself, for phases that train on its own (rejection sampling), at the same rate

The length of the completions decides all of them. It is that of the stored rollouts of the run, else as given, else
that of the teacher's stored traces, else assumed (`ASSUMED_SHARE` of max_new_tokens), and never above max_new_tokens;
of the base's own answers it is that of the teacher's traces. The share of the groups that are skipped is that of the
run's log, else none: the time of a training is then a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill import catalog
from distill.artefacts import RunPaths
from distill.console import counted, short
from distill.objectives import Grpo, OnPolicy
from distill.objectives.rollout_settings import RolloutSettings
from distill.plan.hardware import Hardware
from distill.plan.training import UTILISATION, Data, student_sizes, teacher_bytes
from distill.planned import Expected, StagePlan
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore

if TYPE_CHECKING:
    from distill.plan.traces import Traces
    from distill.recipe import Recipe
    from distill.recipe.price import Price

ASSUMED_SHARE = 0.5  # mean length of a rollout as a share of max_new_tokens
DECODING = 0.05  # share of the data sheet's rate at which large batches are decoded; large mixtures reach 3 to 10 %
TOKEN_BYTES = 12  # of a stored token, with its text, where no trace is stored to measure it on
LIKELIEST_BYTES = 4  # of one of the student's likeliest tokens, which are stored until two checkpoints later
GRADING_SECONDS = 0.01  # of an answer


@dataclass(frozen=True)
class RolloutPlan:
    """The rollouts of one training. steps: optimiser steps. mean: completion tokens, of which at most `limit`. prompt:
    mean tokens of a prompt. basis: what the mean comes from. traces: rows of the teacher's that are mixed in, and their
    mean completion tokens. skipped: share of the groups that are not trained on, None where it is not known."""

    steps: int
    sets: int
    count: int
    mean: float
    limit: int
    prompt: float
    basis: str
    traces: tuple[int, float] = (0, 0.0)
    skipped: float | None = 0.0

    @property
    def read(self) -> float:
        """Tokens of prompts and completions."""
        return self.count * (self.prompt + self.mean)

    def data(self, max_length: int) -> Data:
        """The rows of the training, of all its steps."""
        mixed, mean = self.traces
        trained = 1 - (self.skipped or 0.0)
        tokens = round(trained * self.read + mixed * (self.prompt + mean))
        longest = min(max_length, math.ceil(self.prompt) + self.limit)
        return Data(round(trained * self.count) + mixed, tokens, longest, "rollouts, each read once", self.steps)

    def described(self) -> str:
        """A line of the plan."""
        return (
            f"{self.sets:,} sets of rollouts, {counted(self.count, 'rollout')} of mean {self.mean:,.0f} tokens "
            f"({self.basis}), at most {short(self.count * self.limit)} tokens{self._skipped()}"
        )

    def _skipped(self) -> str:
        if self.skipped is None:
            return "; groups without variance are not trained on, and none is assumed"
        return f"; {self.skipped:.0%} in groups without variance, as logged" if self.skipped else ""


def estimate_rollouts(
    recipe: "Recipe", directory: Path, traces: "Traces", mean: int | None, prompt: float
) -> RolloutPlan | None:
    """The rollouts of a recipe's one training; None without any. directory: of the run, or of the phase. mean: tokens
    as the user gives them. prompt: mean tokens of a prompt."""
    settings, objective = recipe.train, recipe.train.objective
    rollouts = objective.rollout_settings
    if rollouts is None:
        return None
    prompts = max(1, round(traces.prompts * (1 - settings.val_size)))  # the others' traces are held out
    steps = rollouts.total_steps(prompts, settings.num_train_epochs, settings.max_steps)
    sets = -(-steps // rollouts.updates)
    count = sets * min(rollouts.prompts_per_step, prompts) * rollouts.samples
    limit = rollouts.sampling.max_new_tokens
    length, basis = _length(directory, rollouts, traces, mean)
    mixed = 0
    if isinstance(objective, OnPolicy) and objective.student_share < 1:
        mixed = round(count * (1 - objective.student_share) / objective.student_share)
    skipped = _skipped(directory) if isinstance(objective, Grpo) else 0.0
    return RolloutPlan(steps, sets, count, min(length, limit), limit, prompt, basis, (mixed, traces.mean), skipped)


def _skipped(directory: Path) -> float | None:
    """The mean share of skipped groups in the log of a training; None without one. Errors: UserError for a damaged
    log."""
    rows = Ledger(RunPaths(directory).log).rows()
    shares = [share for row in rows if isinstance(share := row.get("skipped_groups"), float | int)]
    return sum(shares) / len(shares) if shares else None


def _length(directory: Path, rollouts: RolloutSettings, traces: "Traces", mean: int | None) -> tuple[float, str]:
    lengths = [each.tokens for each in TraceStore(RunPaths(directory).rollouts).figures()] if mean is None else []
    if lengths:
        return sum(lengths) / len(lengths), f"as the {len(lengths):,} stored"
    if mean is not None:
        return mean, "as given"
    if traces.disk is not None:
        return traces.mean, "as the teacher's stored traces"
    share = "half" if ASSUMED_SHARE == 0.5 else f"{ASSUMED_SHARE:.0%}"
    return ASSUMED_SHARE * rollouts.sampling.max_new_tokens, f"{share} of max_new_tokens assumed; set --mean-tokens"


def stages_of(
    recipe: "Recipe", plans: Sequence[tuple["Recipe", RolloutPlan]], price: "Price | None", hardware: Sequence[Hardware]
) -> list[StagePlan]:
    """The stages `rollouts` and `scoring` of all trainings together; none without rollouts. plans: with the recipe of
    each training. price: of the teacher's tokens. Hours are on the first machine."""
    if not plans:
        return []
    sampled = sum(plan.count * plan.mean for _, plan in plans)
    active, size = student_sizes(recipe)
    machine = hardware[0] if hardware else None
    rate = decoding_rate(active, 2 * size, machine) if machine else None
    hours = [_scoring_hours(alone, plan, (active, 2 * size), machine) for alone, plan in plans]
    known = [each for each in hours if each is not None]
    asked = [plan for alone, plan in plans if alone.train.objective.teacher_top_k is not None]
    money = sum(price.cost(plan.read, plan.count) for plan in asked) if price else 0.0
    disk = sum(stored_bytes(alone, plan) for alone, plan in plans)
    return [
        StagePlan(
            stage="rollouts",
            tokens=Expected(value=sampled),
            hours=Expected(value=sampled / rate / 3600) if rate else None,
            disk=Expected(value=disk),
        ),
        StagePlan(
            stage="scoring",
            tokens=Expected(value=sum(plan.read for plan in asked)) if asked else None,
            hours=Expected(value=sum(known)) if len(known) == len(hours) else None,
            money=Expected(value=money) if price and asked else None,
        ),
    ]


def _scoring_hours(
    recipe: "Recipe", plan: RolloutPlan, student: tuple[float, float], machine: Hardware | None
) -> float | None:
    """student: its active parameters in billions, and GB. None where a model that scores has no known rate: no machine,
    a server, or weights that do not fit."""
    objective = recipe.train.objective
    workers = recipe.filter.correct.workers if recipe.filter.correct else 1
    hours = plan.count * GRADING_SECONDS / max(workers, 1) / 3600
    scoring: list[tuple[float, float]] = []  # active parameters in billions, GB of weights
    if objective.teacher_top_k is not None:
        if catalog.server_of(recipe) is not None:
            return None
        card = catalog.load_teacher(recipe.teacher)
        scoring.append((card.active_parameters, teacher_bytes(recipe)[0] / 1e9))
    if objective.needs_reference:
        scoring.append(student)
    for active, size in scoring:
        if machine is None or size * 1e9 > 0.9 * machine.memory:  # each device has all of it
            return None
        hours += 2 * active * 1e9 * plan.read / (machine.devices * machine.rate * UTILISATION) / 3600
    return hours if machine is not None else None


def decoding_rate(active: float, size: float, machine: Hardware) -> float | None:
    """Completion tokens per second of a model on a machine; None where the weights do not fit.

    active: parameters that take part in a token, in billions. size: of the weights, in GB.
    """
    if size * 1e9 > 0.9 * machine.memory * machine.devices:
        return None
    return machine.devices * machine.rate * DECODING / (2 * active * 1e9)


def stored_bytes(recipe: "Recipe", plan: RolloutPlan) -> float:
    """Bytes of the stored rollouts: with the student's likeliest tokens of the sets since the checkpoint before the
    last, where the teacher scores them."""
    objective, settings = recipe.train.objective, recipe.train
    stored = plan.count * plan.mean * TOKEN_BYTES
    if isinstance(objective, OnPolicy) and objective.estimator == "exact" and catalog.server_of(recipe) is None:
        sets = min(plan.sets, -(-2 * settings.save_steps // objective.rollouts.updates))
        stored += sets / max(plan.sets, 1) * plan.count * plan.mean * LIKELIEST_BYTES * objective.top_k
    return stored


def answers_of(recipe: "Recipe", traces: "Traces", hardware: Sequence[Hardware]) -> StagePlan | None:
    """The stage `answers`: what the bases of all trainings answer themselves, before any filter; None without such.

    As long as the teacher's traces: nothing is known of a base that an earlier phase trains. Hours are on the first
    machine.
    """
    samples = sum(training.own.samples for training in recipe.train.trainings if training.own)
    if not samples:
        return None
    tokens = traces.prompts * samples * traces.mean
    active, size = student_sizes(recipe)
    rate = decoding_rate(active, 2 * size, hardware[0]) if hardware else None
    return StagePlan(
        stage="answers",
        tokens=Expected(value=tokens),
        hours=Expected(value=tokens / rate / 3600) if rate else None,
        disk=Expected(value=tokens * TOKEN_BYTES),
    )
