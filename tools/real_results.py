"""What a distillation of real models gave: the scores of several runs on one benchmark, and what each cost.

    python tools/real_results.py --out docs NAME=DIR [NAME=DIR …]

A DIR is a run directory or the `--out` of an evaluation, and NAME is what its model is called in the results. From a
run directory `base` and `teacher` take the evaluation of that model, every other name the student's. For example:

    python tools/real_results.py --out docs base=runs/gsm8k-smollm2-135m student=runs/gsm8k-smollm2-135m \
        on_policy=runs/on-policy teacher=scores

`base` and `student` must be among the names. Writes `real.json` and `real.png` into --out:

- `scores`: by name `pass@1` with its 95 % interval, `problems`, and the rates beside it
- `gain`: the student's pass@1 less the base's on the same problems, with its interval; `gains`: every name's
- `settings`: what is trained otherwise than in the student's run, by name
- `stages`: by name and stage the hours worked, the machines, the tokens, and whether it was finished
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learning_curve import with_interval  # first: it adds the project to the path

from distill.artefacts import RunPaths
from distill.config import parse, read_yaml
from distill.errors import UserError
from distill.eval.statistics import Difference, compare
from distill.evaluations import Results, finished_evaluations, read_results
from distill.recipe import Recipe
from distill.record import StageRecord, read_identity
from distill.report.contents import read_contents
from distill.report.pictures import LIGHT

RATES = ("truncated_rate", "no_answer_rate", "unverifiable_rate", "mean_completion_tokens")
LEAST = 0.1  # per cent, on the picture's axis
OF_A_RUN = ("base", "teacher")  # names that are not the student's


def is_a_run(directory: Path) -> bool:
    """Whether a directory is a run's, and not the `--out` of an evaluation."""
    return read_identity(directory, "NAME=DIR") is not None


def results_of(name: str, directory: Path) -> Results:
    """The evaluation of a name. Errors: UserError when a directory has none, or several that it may mean."""
    run = is_a_run(directory)
    found = finished_evaluations(RunPaths(directory).eval if run else directory)
    if len(found) != 1:
        raise UserError(f"{directory}: expected evaluations on one benchmark; found {', '.join(found) or 'none'}")
    (models,) = found.values()
    wanted = (name if name in OF_A_RUN else "student") if run else next(iter(models))
    if wanted not in models or (not run and len(models) > 1):
        raise UserError(f"{directory}: expected an evaluation of {wanted} alone; found {', '.join(models)}")
    return read_results(models[wanted])


def score(results: Results) -> dict[str, Any]:
    """The figures of an evaluation that a reader asks for first."""
    scores = results.scores
    assert with_interval(list(results.correct.values()))["value"] == scores.pass_at_1.value, "scores and grades differ"
    found = scores.pass_at_1
    return {
        "pass@1": {"value": found.value, "low": found.low, "high": found.high},
        "problems": scores.problems,
        "samples_per_problem": scores.samples_per_problem,
        **{rate: getattr(scores, rate) for rate in RATES},
    }


def on_common_problems(first: Results, second: Results) -> Difference:
    """The first less the second, on the problems that both answered."""
    a, b = first.correct, second.correct
    common = [prompt for prompt in a if prompt in b]
    return compare({prompt: a[prompt] for prompt in common}, {prompt: b[prompt] for prompt in common})


def gain(difference: Difference) -> dict[str, Any]:
    """A difference in numbers: gained and lost count problems."""
    return {
        "value": difference.value,
        "low": difference.low,
        "high": difference.high,
        "gained": len(difference.gained),
        "lost": len(difference.lost),
        "p": difference.p,
    }


def stages_of(name: str, directory: Path) -> dict[str, Any]:
    """Hours, machines and tokens of each stage of a run that was worked on, finished or cut off; of a base or a teacher
    those of its evaluation."""
    paths, stages = RunPaths(directory), {}
    recipe = parse(Recipe, read_yaml(paths.recipe), str(paths.recipe))
    for stage in read_contents(directory, recipe).stages:
        record = StageRecord.read_if_there(paths.record(stage.name), f"run `distill {stage.name}` again")
        if record and record.seconds and (stage.name == "eval" if name in OF_A_RUN else stage.name != "report"):
            stages[stage.name] = {
                "finished": stage.finished,
                "hours": round(record.seconds / 3600, 3),
                "machines": list(record.machines),
                "tokens": stage.tokens,
            }
    return stages


def training_of(directory: Path) -> dict[str, Any]:
    """The settings of a run's training, flat, from its record. Empty where it has not trained."""
    record = StageRecord.read_if_there(RunPaths(directory).record("train"), "run `distill train` again")
    settings = record.settings if record else {}
    local = ("teacher.", "student.", "data.")  # checksums and places, which differ between machines
    return {key: value for key, value in settings.items() if not key.startswith(local)}


def lowest(scores: Mapping[str, dict[str, Any]]) -> float:
    """The lowest end of an interval in the picture, in per cent."""
    return max(LEAST, min(100 * row["pass@1"]["low"] for row in scores.values()))


def draw(scores: Mapping[str, dict[str, Any]], title: str, path: Path) -> None:
    """A point and its interval for each name. The axis is logarithmic: a student of one per cent and a teacher of fifty
    are in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 0.9 + 0.42 * len(scores)))
    for y, (name, row) in enumerate(scores.items()):
        value, low, high = (max(LEAST, 100 * row["pass@1"][key]) for key in ("value", "low", "high"))
        colour = LIGHT.get(name, LIGHT["student"])
        axes.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot([value], [y], marker="o", markersize=7, color=colour)
        shown = [f"{100 * row['pass@1'][key]:.1f}" for key in ("value", "low", "high")]
        label = f"{shown[0]} % ({shown[1]}–{shown[2]}), {row['problems']:,} problems"
        axes.annotate(label, (high, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(scores)), [name.replace("_", " ") for name in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= 0.5 * lowest(scores)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=0.8 * lowest(scores), right=1500)  # beyond 100 for the labels
    axes.spines["bottom"].set_bounds(0.8 * lowest(scores), 100)
    axes.set_xlabel(f"pass@1 in %, 95 % intervals, {title}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the runs, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    places = {name: Path(directory) for name, _, directory in (each.partition("=") for each in args.runs)}
    if missing := [name for name in ("base", "student") if name not in places]:
        raise SystemExit(f"missing {' and '.join(missing)}; expected NAME=DIR, among them base and student")
    try:
        results = {name: results_of(name, directory) for name, directory in places.items()}
        stages = {name: stages_of(name, directory) for name, directory in places.items() if is_a_run(directory)}
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    gains = {name: gain(on_common_problems(found, results["base"])) for name, found in results.items()}
    del gains["base"]
    training = {name: training_of(directory) for name, directory in places.items() if name not in OF_A_RUN}
    benchmark = results["base"].scores.benchmark
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "scores": {name: score(found) for name, found in results.items()},
        "gain": gains["student"],
        "gains": gains,
        "settings": {
            name: {key: value for key, value in settings.items() if training["student"].get(key) != value}
            for name, settings in training.items()
        },
        "stages": stages,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "real.json").write_text(json.dumps(content, indent=2) + "\n")
    draw(content["scores"], benchmark, args.out / "real.png")


if __name__ == "__main__":
    main()
