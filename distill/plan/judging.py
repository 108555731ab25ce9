"""The judgements of a recipe with `judge:`: how many, their tokens, and their price.

A judge is asked once for every trace in `filter.judge`, for every trace of a prompt of task `judge` in
`filter.correct`, for every rollout of such a prompt where `grpo` rewards correct answers, and for every answer of a
benchmark of that task. This is an upper bound: an identical response is
judged once, and an empty one never. The tokens of a judgement are those of the run's stored judgements on average;
before there are any they are assumed (`ASSUMED`): the question, the rubric and a response without its reasoning, and a
brief explanation. A judge that reasons writes several times as much.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill import catalog
from distill.artefacts import RunPaths
from distill.grading.judge import judge_price
from distill.grading.judged import JUDGE
from distill.objectives import Grpo
from distill.plan.problems import problems_of
from distill.planned import Judgements
from distill.prompts import Prompt
from distill.traces.ledger import Ledger

if TYPE_CHECKING:
    from distill.plan.rollouts import RolloutPlan
    from distill.plan.traces import Traces
    from distill.recipe import Recipe

ASSUMED = (1000, 200)  # prompt and completion tokens of a judgement


def plan_judgements(
    recipe: "Recipe",
    paths: RunPaths,
    prompts: Sequence[Prompt] | None,
    traces: "Traces",
    rollouts: "Sequence[tuple[Recipe, RolloutPlan]]" = (),
) -> Judgements | None:
    """The judgements of the filters, the trainings and the evaluation; None where no judge is asked. rollouts: with the
    recipe of each training."""
    if recipe.judge is None:
        return None
    share = _judged_share(recipe, prompts)
    filtered = traces.count if recipe.filter.judge else 0
    if recipe.filter.correct:
        filtered += round(traces.count * share)
    rewarded = sum(round(plan.count * share) for alone, plan in rollouts if _rewards_correct(alone))
    answers = 0
    for name in recipe.eval.benchmarks:
        card = catalog.load_benchmark(name)
        if card.task == JUDGE:
            problems = problems_of(card, recipe.eval) or 0
            answers += problems * (recipe.eval.samples or card.samples) * len(recipe.eval.models)
    if not filtered + rewarded + answers:
        return None
    stored, prompt_tokens, completion_tokens = _stored(paths)
    if not stored:
        prompt_tokens, completion_tokens = ASSUMED[0], min(ASSUMED[1], recipe.judge.sampling.max_new_tokens)
    price, count = judge_price(recipe.judge), filtered + rewarded + answers
    return Judgements(
        filter=filtered,
        train=rewarded,
        eval=answers,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        stored=stored,
        money=price.cost(count * prompt_tokens, count * completion_tokens) if price else None,
        currency=price.currency if price else "",
    )


def described(judgements: Judgements) -> str:
    """The judgements as a line of the plan."""
    source = f"as the {judgements.stored:,} stored have" if judgements.stored else "assumed"
    money = "" if judgements.money is None else f": {judgements.money:,.2f} {judgements.currency}, beside the table"
    rewarded = f"{judgements.train:,} of train, " if judgements.train else ""
    return (
        f"judge: at most {judgements.count:,} judgements ({judgements.filter:,} of filter, {rewarded}"
        f"{judgements.eval:,} of eval) of {judgements.prompt_tokens:,.0f} prompt and "
        f"{judgements.completion_tokens:,.0f} completion tokens, {source}{money}"
    )


def _rewards_correct(recipe: "Recipe") -> bool:
    objective = recipe.train.objective
    return isinstance(objective, Grpo) and objective.rewards.correct > 0


def _judged_share(recipe: "Recipe", prompts: Sequence[Prompt] | None) -> float:
    """The share of prompts that the judge grades; where they are not read, all or none by the sources' tasks."""
    if prompts:
        return sum(prompt.task == JUDGE for prompt in prompts) / len(prompts)
    sources = (*recipe.prompts, *recipe.traces)
    return float(any(getattr(source, "task", None) == JUDGE for source in sources))


def _stored(paths: RunPaths) -> tuple[int, float, float]:
    """Number of stored judgements, and their mean prompt and completion tokens."""
    ledgers = map(Ledger, sorted(paths.judgements.glob("*.jsonl")))
    rows = [row for ledger in ledgers for row in ledger.rows() if row["id"] is not None]  # None: a failed request
    if not rows:
        return 0, 0.0, 0.0
    prompt = math.fsum(row["prompt_tokens"] for row in rows) / len(rows)
    return len(rows), prompt, math.fsum(row["completion_tokens"] for row in rows) / len(rows)
