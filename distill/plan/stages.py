"""`distill plan` for a whole recipe: tokens, hours, money and disk of each stage, before they are spent.

All follows from the length of the traces. It is estimated from the traces that the run directory holds (a pilot, an
unfinished or a finished `distill generate`), else as the user gives it, else assumed, and the output says which. Hours
are at the rate that a pilot or the last `distill generate` measured, or on the machines named at a share of their data
sheet's rate. Prompt tokens are counted where the teacher's tokenizer is on this machine.

Hub data sets are read for a pilot and where traces are stored, and not for a guess: a plan needs no network.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill import catalog, generate
from distill.artefacts import GenerateSummary, RunPaths
from distill.backends.collect import asked
from distill.console import bytes_text, say, short, table
from distill.errors import UserError
from distill.fingerprint import digest
from distill.model_families import published_bytes
from distill.models import Models
from distill.plan.hardware import Hardware, parse
from distill.plan.judging import described, plan_judgements
from distill.plan.problems import problems_of, rows_in
from distill.plan.rollouts import (
    DECODING,
    TOKEN_BYTES,
    RolloutPlan,
    answers_of,
    decoding_rate,
    estimate_rollouts,
    stages_of,
)
from distill.plan.traces import Traces, estimate_traces, pilot_of
from distill.plan.training import (
    MACHINES,
    UTILISATION,
    Data,
    configuration,
    disk_of,
    plan_training,
    student_sizes,
    trained_tokens,
)
from distill.planned import Expected, Measured, Plan, StagePlan
from distill.prompts import Prompt, load_prompts
from distill.recipe import Phase
from distill.run import Run
from distill.traces.store import TraceStore
from distill.train.phases import phase_directory

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.recipe.price import Price

ASSUMED_PROMPT = 150  # tokens of a prompt that cannot be counted: a problem and its instruction
FILTER_SECONDS = 0.01  # to judge a trace; grading takes most of it


def plan_recipe(
    recipe: "Recipe",
    directory: Path,
    machines: Sequence[str] = (),
    traces: int | None = None,
    mean: int | None = None,
    pilot: int | None = None,
) -> Plan:
    """Print the plan of all stages, and return it. It is stored where there is a run directory.

    machines: names of hardware. traces, mean: number and mean tokens of traces, in place of the estimates. pilot:
    prompts to sample first, into the run directory. Errors: UserError for an unknown machine, a run with other
    settings, or what `distill generate` refuses.
    """
    hardware = [parse(name) for name in machines]
    paths = RunPaths(directory)
    measured = _pilot(recipe, directory, pilot) if pilot else None
    previous = Plan.read_if_there(paths.plan, "remove it, and run `distill plan` again")
    drawn = previous.pilot if previous else None
    measured = measured or _measured(recipe, directory) or _of_same_settings(recipe, previous)
    prompts = _prompts(recipe, paths)
    if pilot and prompts is not None:
        drawn = pilot_of(recipe, prompts, pilot).joined(drawn)
    estimate = estimate_traces(recipe, directory, prompts, traces, mean, drawn)
    prompt_tokens, counted = _prompt_tokens(recipe, prompts, estimate, measured)
    price = catalog.price_of(recipe)
    teaching = (_generate(recipe, estimate, prompt_tokens, price, measured, hardware), _filter(recipe, estimate))
    train, rollouts = _train(recipe, estimate, directory, machines, traces, mean, prompt_tokens)
    stages = (
        *(teaching if recipe.reads_traces else ()),
        *stages_of(recipe, rollouts, price, hardware),
        *([answers] if (answers := answers_of(recipe, estimate, hardware)) else []),
        train,
        _eval(recipe, estimate, price, measured, hardware),
    )
    plan = Plan(
        traces=estimate.count,
        mean_tokens=estimate.mean,
        basis=estimate.basis,
        prompt_tokens=prompt_tokens,
        price=f"{price.date}, {price.source}" if price and not recipe.traces else None,
        currency=price.currency if price and not recipe.traces else "",
        input_price=price.input if price else None,
        output_price=price.output if price else None,
        measured=measured,
        pilot=drawn,
        judgements=plan_judgements(recipe, paths, prompts, estimate, rollouts),
        stages=stages,
    )
    _show(recipe, plan, estimate, counted, price, hardware)
    if paths.identity.exists():
        plan.write(paths.plan)
        say(f"stored in {paths.plan}; `distill report` shows it beside what is measured")
    return plan


def _pilot(recipe: "Recipe", directory: Path, count: int) -> Measured | None:
    """Sample the pilot's prompts into the run directory."""
    if recipe.traces:
        raise UserError("--pilot asks the teacher, and this recipe copies published traces; leave --pilot out")
    if not recipe.reads_traces:
        raise UserError("--pilot asks the teacher, and nothing is trained on its traces; set --mean-tokens instead")
    catalog.check_recipe(recipe, ["teacher"])
    with Run(directory, recipe) as run:
        return generate.sample_pilot(run, count)


def _measured(recipe: "Recipe", directory: Path) -> Measured | None:
    """The speed of a finished `distill generate`."""
    summary = Run(directory, recipe).stored_summary("generate", GenerateSummary)
    if summary is None or not summary.tokens_per_second or not summary.made:
        return None
    return Measured(
        rate=summary.tokens_per_second,
        at_once=generate.at_once(recipe),
        prompt_tokens=(summary.prompt_tokens / summary.traces) or None,
        settings=digest(generate.STAGE.recipe_settings(recipe)),
    )


def _of_same_settings(recipe: "Recipe", previous: Plan | None) -> Measured | None:
    """The speed in the stored plan, if it was measured with this teacher and these settings."""
    measured = previous.measured if previous else None
    same = measured is not None and measured.settings == digest(generate.STAGE.recipe_settings(recipe))
    return measured if same else None


def _prompts(recipe: "Recipe", paths: RunPaths) -> list[Prompt] | None:
    """The prompts where they can be read without a download, or were downloaded for the stored traces."""
    on_hub = any(source.kind == "hub" for source in recipe.prompts)
    if recipe.traces or (on_hub and TraceStore(paths.traces).is_empty()):
        return None
    return list(load_prompts(recipe.prompts, None, recipe.generate.max_prompts))


def _prompt_tokens(
    recipe: "Recipe", prompts: list[Prompt] | None, traces: Traces, measured: Measured | None
) -> tuple[float, str]:
    """Prompt tokens of all requests, and how they are known: counted, measured or assumed."""
    if recipe.traces:
        return float(traces.count * ASSUMED_PROMPT), "assumed"
    teacher = catalog.load_teacher(recipe.teacher)
    local = teacher.weights is not None and catalog.local_weights("teacher", recipe.teacher)
    if prompts is not None and local and catalog.server_of(recipe) is None:
        chat, suffix = Models(recipe, Path()).teacher.chat, recipe.generate.prompt_suffix
        counts = [len(ids) for ids in chat.prompts_ids(asked(prompt, suffix).messages for prompt in prompts)]
        return statistics.fmean(counts) * traces.count, "counted"
    if measured and measured.prompt_tokens:
        return measured.prompt_tokens * traces.count, "measured"
    return float(traces.count * ASSUMED_PROMPT), "assumed"


def _generate(
    recipe: "Recipe",
    traces: Traces,
    prompt_tokens: float,
    price: "Price | None",
    measured: Measured | None,
    hardware: Sequence[Hardware],
) -> StagePlan:
    disk = Expected(value=traces.disk * traces.count) if traces.disk else traces.tokens.times(TOKEN_BYTES)
    if recipe.traces:
        return StagePlan(stage="generate", tokens=traces.tokens, disk=disk)
    rate = _teacher_rate(recipe, measured, hardware)
    hours = traces.tokens.times(1 / rate / 3600) if rate else None
    money = None
    if price:
        ends = (traces.tokens.value, traces.tokens.low, traces.tokens.high)
        value, low, high = (None if end is None else price.cost(prompt_tokens, end) for end in ends)
        money = Expected(value=value or 0.0, low=low, high=high)
    return StagePlan(stage="generate", tokens=traces.tokens, hours=hours, money=money, disk=disk)


def _teacher_rate(recipe: "Recipe", measured: Measured | None, hardware: Sequence[Hardware]) -> float | None:
    """Tokens a second on the first machine; what was measured, where a provider has the teacher. The local engine keeps
    the whole model on every device, a server splits it among them."""
    if not hardware or catalog.price_of(recipe) is not None:
        return measured.rate if measured else None
    card, machine = catalog.load_teacher(recipe.teacher), hardware[0]
    size = card.parameters * published_bytes(card.family)
    if catalog.server_of(recipe) is None and size * 1e9 > 0.9 * machine.memory:
        return None
    return decoding_rate(card.active_parameters, size, machine)


def _filter(recipe: "Recipe", traces: Traces) -> StagePlan:
    workers = recipe.filter.correct.workers if recipe.filter.correct else 1
    hours = Expected(value=traces.count * FILTER_SECONDS / max(workers, 1) / 3600)
    size = traces.disk * traces.count if traces.disk else traces.tokens.value * TOKEN_BYTES
    return StagePlan(stage="filter", hours=hours, disk=Expected(value=size))


def _train(
    recipe: "Recipe",
    traces: Traces,
    directory: Path,
    machines: Sequence[str],
    given: int | None,
    mean: int | None,
    prompt_tokens: float,
) -> "tuple[StagePlan, list[tuple[Recipe, RolloutPlan]]]":
    """The table of each training, with the expected tokens; hours of the recipe's own method on the first machine. And
    the rollouts of each training that has some, with its recipe.

    Phases are added up.
    """
    tokens, hours, disk = 0.0, 0.0, 0.0
    rollouts: list[tuple[Recipe, RolloutPlan]] = []
    for number, training in enumerate(recipe.train.trainings):
        place, alone = directory, recipe
        if isinstance(training, Phase):
            say(f"phase {number + 1}, {training.name}:")
            place = phase_directory(directory, recipe, number)
            alone = recipe.model_copy(update={"train": training.training(training.data)})
        expected = _rows(alone, traces, prompt_tokens)
        own = estimate_rollouts(alone, place, traces, mean, prompt_tokens / max(traces.count, 1))
        if own is not None:
            say(own.described())
            rollouts.append((alone, own))
            expected = own.data(alone.train.max_length)
        ways, data = plan_training(alone, place, machines or MACHINES, given, mean, expected)
        tokens += trained_tokens(alone.train, data)
        disk += sum(disk_of(alone.train, configuration(alone, catalog.load_student(alone.student))))
        fitting = [way for way in ways if way.hardware.name == ways[0].hardware.name and way.own and way.runs]
        hours += fitting[0].hours if fitting else float("nan")
        if training.own:
            say(
                f"{traces.prompts * training.own.samples:,} answers of its base, of mean {traces.mean:,.0f} "
                f"tokens ({traces.basis}): row `answers` below"
            )
    known = bool(machines) and not math.isnan(hours)
    stage = StagePlan(
        stage="train",
        tokens=Expected(value=tokens),
        hours=Expected(value=hours) if known else None,
        disk=Expected(value=disk),
    )
    return stage, rollouts


def _rows(recipe: "Recipe", traces: Traces, prompt_tokens: float) -> Data:
    """The rows of a training before they are encoded: as many as the teacher's traces, as its base answers and as its
    files have, by their weights, all as long as the teacher's traces."""
    selected = recipe.filter.select.per_prompt if recipe.filter.select else None
    per_trace = traces.mean + prompt_tokens / max(traces.count, 1)
    weighted, unknown = 0.0, []
    for source in recipe.train.data:
        match source.kind:
            case "kept":
                rows = traces.prompts * min(traces.samples, selected or traces.samples)
            case "own":
                rows = traces.prompts * min(source.samples, selected or source.samples)
            case "file":
                rows = rows_in(source.path, source.split, source.limit)
            case _:
                rows = 0
                unknown.append(source.path if source.kind == "run" else source.dataset)
        weighted += rows * source.weight
    count = max(1, round(weighted))
    basis = "of the selected traces" if selected and selected < traces.samples else "if all traces are kept"
    without = f"; without {', '.join(unknown)}" if unknown else ""
    return Data(
        count,
        round(count * min(per_trace, recipe.train.max_length)),
        recipe.train.max_length,
        f"{basis}; {traces.basis}{without}",
    )


def _eval(
    recipe: "Recipe",
    traces: Traces,
    price: "Price | None",
    measured: Measured | None,
    hardware: Sequence[Hardware],
) -> StagePlan:
    """Problems × samples × models, each as long as the teacher's traces: nothing is known of the models yet.

    hours: where the rate of every model is known. money: of the answers of a teacher with a price. Neither nor tokens
    where the problems of a benchmark are not known.
    """
    answers, tokens = 0, 0.0  # of one model
    for name in recipe.eval.benchmarks:
        card = catalog.load_benchmark(name)
        problems = problems_of(card, recipe.eval)
        if problems is None:
            say(f"eval: how many problems {card.name} has is not known; its card may say `problems`")
            return StagePlan(stage="eval")
        count = problems * (recipe.eval.samples or card.samples)
        answers += count
        tokens += count * min(traces.mean, recipe.eval.max_new_tokens or card.sampling.max_new_tokens)
    active, size = student_sizes(recipe)
    student_rate = decoding_rate(active, 2 * size, hardware[0]) if hardware else None
    teacher_rate = _teacher_rate(recipe, measured, hardware)
    rates = [teacher_rate if model == "teacher" else student_rate for model in recipe.eval.models]
    known = [rate for rate in rates if rate]
    hours = sum(tokens / rate for rate in known) / 3600
    asks = price is not None and "teacher" in recipe.eval.models
    total = tokens * len(rates)
    return StagePlan(
        stage="eval",
        tokens=Expected(value=total),
        hours=Expected(value=hours) if len(known) == len(rates) else None,
        money=Expected(value=price.cost(answers * ASSUMED_PROMPT, tokens)) if price and asks else None,
        disk=Expected(value=total * TOKEN_BYTES),
    )


# ---- output


def _show(
    recipe: "Recipe",
    plan: Plan,
    traces: Traces,
    counted: str,
    price: "Price | None",
    hardware: Sequence[Hardware],
) -> None:
    rows = [
        (
            stage.stage,
            shown(stage.tokens),
            interval(stage.tokens),
            shown(stage.hours, "h"),
            shown(stage.money),
            shown(stage.disk, "B"),
        )
        for stage in plan.stages
    ]
    money = plan.currency or "money"
    table("All stages", ("stage", "tokens", "95 % interval", "hours", money, "disk"), rows)
    if recipe.reads_traces:
        say(f"{plan.traces:,} traces, mean {plan.mean_tokens:,.0f} tokens: {plan.basis}")
    if traces.truncated is not None:
        say(f"{traces.truncated:.1%} of the stored traces end at max_new_tokens")
    if recipe.traces:
        say("published traces: nothing is asked of a teacher")
    elif not recipe.reads_traces:
        say("nothing is trained on the teacher's traces: generate and filter are skipped")
    else:
        say(f"{short(plan.prompt_tokens)} prompt tokens ({counted})")
    if price is not None and not recipe.traces:
        say(
            f"money: price of {price.date}, {price.input:g} {price.currency} per million prompt tokens, "
            f"{price.output:g} per million completion tokens ({price.source})"
        )
    if plan.judgements is not None:
        say(described(plan.judgements))
    _say_hours(recipe, plan, hardware)
    if recipe.price_per_hour is not None and (hours := [s.hours.value for s in plan.stages if s.hours]):
        unknown = [s.stage for s in plan.stages if not s.hours and s.money is None]
        without = f", without {' and '.join(unknown)}, whose hours are not known" if unknown else ""
        say(f"machine: {sum(hours) * recipe.price_per_hour:,.2f} at {recipe.price_per_hour:g} an hour{without}")
    if recipe.reads_traces:
        say("eval: answers as long as the teacher's traces, at most its max_new_tokens")
    else:
        say(f"eval: answers of at most {plan.mean_tokens:,.0f} tokens: {plan.basis.partition(';')[0]}")


def _say_hours(recipe: "Recipe", plan: Plan, hardware: Sequence[Hardware]) -> None:
    if hardware:
        rate = f"{DECODING:.0%} of the data sheet's bfloat16 rate"
        sampled = ("rollouts",) if recipe.traces else ("generate", "rollouts")
        stages = [stage.stage for stage in plan.stages if stage.stage in sampled]
        say(f"hours of {' and '.join([*stages, 'eval'])}: on {hardware[0].name} at {rate}, a rough guess")
        if "rollouts" in stages:
            say(f"hours of scoring: one pass over the rollouts at {UTILISATION:.0%}, and the graders")
        if plan.stages[0].stage == "generate" and plan.stages[0].hours is None and not recipe.traces:
            if catalog.price_of(recipe) is not None:
                say("hours of generate: the provider's, which are not known before some samples")
            elif catalog.server_of(recipe) is None:
                say(f"hours of generate: the teacher does not fit on one GPU of {hardware[0].name}; name a `server`")
            else:
                say(f"hours of generate: the teacher's weights do not fit on {hardware[0].name}")
    elif plan.measured:
        say(
            f"hours of generate: at the measured {plan.measured.rate:,.0f} tokens/s with {plan.measured.at_once:,} "
            f"samples at once; more at once are usually faster"
        )
    else:
        pilot = "" if recipe.traces or not recipe.reads_traces else ", or measure the teacher with --pilot 8"
        say(f"hours: name a machine with --hardware{pilot}")


def shown(expected: Expected | None, unit: str = "") -> str:
    """An estimate in a table; empty without one. unit: "h" or "B" (bytes)."""
    if expected is None:
        return ""
    if unit == "B":
        return bytes_text(expected.value)
    if unit == "h":
        return f"{expected.value:,.2f}" if expected.value >= 0.005 else "< 0.01"
    return short(expected.value)


def interval(expected: Expected | None) -> str:
    """The ends of the interval; empty without one."""
    if expected is None or expected.low is None or expected.high is None:
        return ""
    return f"{short(expected.low)} – {short(expected.high)}"
