"""The judge of rollouts: the recipe's `judge:`, which grades answers to prompts of task `judge` for `grpo`.

It is the judge of the filters and of the evaluation, with its rubric, budget and ledger (`distill.grading.judge`): a
judgement is in `judgements/train.jsonl` before its reward is used, so a killed training gets the same rewards without
asking again. A refused or unclear judgement is unverifiable, which is neither reward nor penalty; a request that fails
ends the training, and a rerun resumes it.

Only the first rank asks: so `judge.budget` and `judge.max_batch` hold for the training as a whole. Rejected: a judge on
every rank, whose budgets would have to be exchanged before each request.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from distill.artefacts import RunPaths, Settings
from distill.grading.judge import JudgeModel, check_budget
from distill.grading.judged import JUDGE
from distill.models import Models
from distill.objectives import Grpo
from distill.prompts import Prompt
from distill.recipe import LocalEngine, Recipe, Train

if TYPE_CHECKING:
    from distill.run import Run


def asks_judge(training: Train, prompts: Iterable[Prompt]) -> bool:
    """Whether rewards need the judge: some prompts are of task `judge`, and correct answers are rewarded."""
    objective = training.objective
    rewards = isinstance(objective, Grpo) and objective.rewards.correct > 0
    return rewards and any(prompt.task == JUDGE for prompt in prompts)


def judge_settings(run: "Run") -> Settings:
    """The rubric, the model and its sampling, which decide rewards; empty where the judge is not asked. Errors: as
    `check_judge`."""
    judge = run.recipe.judge
    if judge is None or not asks_judge(run.recipe.train, run.prompts):
        return {}
    settings = judge.settings() | run.models.judge.identity
    return {f"judge_model.{key}": value for key, value in settings.items()}


def check_judge(recipe: Recipe, models: Models, prompts: Iterable[Prompt]) -> None:
    """Errors: UserError for a judge that is needed and whose card, directory, key or price is missing."""
    if recipe.judge is not None and asks_judge(recipe.train, prompts):
        check_budget(recipe.judge)
        assert models.judge


def opened_judge(
    recipe: Recipe, models: Models, paths: RunPaths, prompts: Iterable[Prompt], engine: LocalEngine
) -> AbstractContextManager[JudgeModel | None]:
    """The judge, for as long as the block lasts; None where it is not asked. engine: of a local one."""
    if recipe.judge is None or not asks_judge(recipe.train, prompts):
        return nullcontext()
    return JudgeModel(recipe.judge, models.judge, engine, paths.judgements, "train")


def judge_bytes(recipe: Recipe, models: Models, prompts: Iterable[Prompt]) -> float:
    """Bytes of the weights of a judge in the local engine; 0 of one elsewhere."""
    if recipe.judge is None or not asks_judge(recipe.train, prompts) or models.judge.is_remote:
        return 0.0
    return float(sum(file.stat().st_size for file in models.judge.directory.glob("*.safetensors")))
