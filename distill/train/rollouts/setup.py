"""What learning from rollouts needs before its first step: the checks that need no rollout, the settings that decide
them, and everything a `RolloutFeed` is made of.

The checks come before the stage begins, so that what they refuse leaves nothing behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distill import backends, model_families
from distill.artefacts import RunPaths
from distill.catalog import load_teacher
from distill.console import say
from distill.errors import UserError
from distill.filters.correct import Correct
from distill.grading.graders import GRADERS
from distill.grading.judged import JUDGE
from distill.models import Model, Models
from distill.objectives import Grpo, OnPolicy
from distill.objectives.grpo import Rewards
from distill.prompts import Prompt
from distill.recipe import Recipe
from distill.train.ranks import model_size
from distill.train.ranks.world import World
from distill.train.rollouts import gate
from distill.train.rollouts.feed import Judges, RolloutFeed
from distill.train.rollouts.judge import check_judge, judge_bytes, opened_judge
from distill.train.rollouts.memory import Engines, engines
from distill.train.rollouts.questions import Questions, questions_of
from distill.train.rollouts.rewards import Rewarder, check_gradable
from distill.train.rollouts.store import RolloutStore
from distill.train.rollouts.student import MAX_BATCH, StudentEngine
from distill.train.rollouts.teachers import Teacher
from distill.train.rows.feed import StoredFeed
from distill.train.student import methods
from distill.train.student.model import as_trained, configuration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORED = 2  # sequences of whole length that a scoring engine has a cache for: it keeps none of them after its step


def check(recipe: Recipe, models: Models, questions: Questions) -> None:
    """Refuse what no rollout is needed to refuse. Errors: UserError, one line with the key of the recipe."""
    settings, objective, prompts = recipe.train, recipe.train.objective, questions.prompts
    rollouts = objective.rollout_settings
    assert rollouts is not None
    if not prompts:
        raise UserError("prompts: there is no prompt for the student to answer; add a source, or raise its `limit`")
    if not rollouts.total_steps(len(prompts), settings.num_train_epochs, settings.max_steps):
        raise UserError(
            f"{len(prompts):,} prompts in {settings.num_train_epochs:g} epochs are less than one optimiser step: raise "
            f"train.num_train_epochs, or set train.max_steps"
        )
    student = models.base.chat
    gate.check_student(student)
    if isinstance(objective, Grpo):
        level = (recipe.filter.correct or Correct()).sandbox
        check_gradable(prompts, objective.rewards, level=level, has_judge=recipe.judge is not None)
        check_judge(recipe, models, prompts)
    limits = {"train.max_length": settings.max_length}
    context = getattr(configuration(models.base.directory, settings), "max_position_embeddings", None)
    if context is not None:  # a recurrent student has none
        limits["the context of the student"] = context
    gate.check_lengths(questions, rollouts.sampling.max_new_tokens, limits)
    if isinstance(objective, OnPolicy):
        if unknown := sorted(objective.teachers.keys() - {prompt.task for prompt in prompts}):
            raise UserError(f"train.objective.teachers: no prompt has task {unknown[0]}; remove it, or add prompts")
        for name, model in (("", models.teacher), *models.teachers.items()):
            gate.check_teacher(student, model.chat)
            card = load_teacher(objective.teachers[name]) if name else models.teacher_card
            routed = [p for p in prompts if (p.task if p.task in objective.teachers else "") == name]
            theirs = {f"the context of the {model.name}": card.context}
            gate.check_lengths(Questions(routed, model.chat), rollouts.sampling.max_new_tokens, theirs)


def graded(prompts: Sequence[Prompt]) -> bool:
    """Whether on-policy rollouts are graded for the curve of pass@1: the prompts have gold answers that are compared
    without running programs or asking a judge."""
    return all(prompt.answer and prompt.task in GRADERS and prompt.task not in ("code", JUDGE) for prompt in prompts)


@contextmanager
def rollout_feed(
    recipe: Recipe,
    models: Models,
    paths: RunPaths,
    trained: "PreTrainedModel",
    world: World,
    questions: Questions | None = None,
    traces: StoredFeed | None = None,
) -> Iterator[RolloutFeed]:
    """The feed of a training with rollouts; teachers, graders and engines live as long as the context.

    trained: the model whose weights the optimiser changes. questions: where the prompts have been read already. traces:
    as of `RolloutFeed`. Errors: UserError.
    """
    settings, objective = recipe.train, recipe.train.objective
    assert isinstance(objective, OnPolicy | Grpo)
    rollouts, questions = objective.rollout_settings, questions or questions_of(recipe, models.base.chat)
    prompts = questions.prompts
    if world.layout == "fsdp" and model_families.falls_back(models.base.directory):
        raise UserError(
            "train.parallel: the engine does not compute this student, whose rollouts are sampled by the trainer's own "
            "weights, and fsdp spreads them over the devices; set it to ddp"
        )
    with ExitStack() as stack:
        dtype = methods.dtypes(settings, world.device).compute
        context = questions.context(rollouts)
        batch = min(MAX_BATCH, -(-rollouts.rows // world.size))
        base = stack.enter_context(as_trained(models.base, settings))
        backend = stack.enter_context(
            backends.open_trained(base, trained, str(world.device), dtype, batch, context, world.main)
        )
        student = StudentEngine(trained, backend, rollouts, settings.seed)
        engine = recipe.engine.model_copy(update={"data_parallel_size": 1, "num_speculative_tokens": 0})
        judges = Judges()
        if isinstance(objective, OnPolicy):
            asked = {"": models.teacher, **models.teachers}
            judges.teachers = {
                task: _teacher(stack, recipe, models, model, backend.vocab_size, world.main)
                for task, model in asked.items()
            }
        weights = objective.rewards if isinstance(objective, Grpo) else Rewards() if graded(prompts) else None
        if weights is not None:
            correct = recipe.filter.correct or Correct()
            judge = opened_judge(recipe, models, paths, prompts, engine) if world.main else nullcontext()
            judges.rewarder = stack.enter_context(
                Rewarder(
                    weights,
                    rollouts.sampling.max_new_tokens,
                    workers=correct.workers,
                    timeout=correct.timeout,
                    level=correct.sandbox,
                    judge=stack.enter_context(judge),
                )
            )
        if objective.needs_reference:
            judges.base = stack.enter_context(backends.open(base, engine, SCORED))
        store = RolloutStore(paths.rollouts, rollouts.samples)
        stack.callback(store.close)
        yield RolloutFeed(objective, settings, prompts, student, models.base.chat, store, judges, world, traces)
        if world.main:
            store.compact(0)
            store.forget()


def _teacher(stack: ExitStack, recipe: Recipe, models: Models, model: Model, vocab_size: int, say_so: bool) -> Teacher:
    objective = recipe.train.objective
    assert isinstance(objective, OnPolicy)
    engine = recipe.engine.model_copy(update={"data_parallel_size": 1, "num_speculative_tokens": 0})
    backend = stack.enter_context(
        backends.open(model, engine) if model.is_remote else backends.open(model, engine, SCORED)
    )
    asks = objective.estimator == "exact" and backend.scores_given_ids
    if objective.estimator == "exact" and not asks and say_so:
        say(
            f"{model.name} is behind a server, which names its own {objective.top_k} likeliest tokens: what only the "
            f"student finds likely is compared as a part of all other tokens"
        )
    return Teacher(backend, model.chat, models.base.chat, vocab_size, objective.rollout_top_k, asks)


def engines_beside(recipe: Recipe, models: Models, questions: Questions, device: torch.device, ranks: int) -> Engines:
    """The engines that share the device with the trainer."""
    settings, rollouts = recipe.train, recipe.train.objective.rollout_settings
    assert rollouts is not None
    config = configuration(models.base.directory, settings)
    compute = methods.dtypes(settings, device).compute
    teachers = (models.teacher, *models.teachers.values()) if isinstance(settings.objective, OnPolicy) else ()
    weights = [
        float(sum(file.stat().st_size for file in model.directory.glob("*.safetensors")))
        for model in teachers
        if not model.is_remote
    ]
    context = questions.context(rollouts)
    parameters = model_size.shape(config).total
    budget = recipe.engine.memory_budget
    beside = engines(config, settings, parameters, compute.itemsize, context, ranks, weights, budget)
    judge = judge_bytes(recipe, models, questions.prompts)
    return replace(beside, judges=(*beside.judges, judge)) if judge else beside
