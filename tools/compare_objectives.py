"""How many tokens each objective needs: learning curves of the tiny pair, several seeds.

    python tools/compare_objectives.py --out DIR [--runs DIR] [--seeds 3]

Two teachers, one student (the embedded base):

- one tokenizer: the student that `distill run tiny` makes, teaching the base it was made from; 240 steps, to see how
  many tokens take it to 85 %
- two tokenizers: tiny-r1; all of the recipe's steps, to see what comes out

Each teaches by its traces alone (`sft`) and by its distributions at them (`logits`), with the same rows in the same
order and the same schedule. After every so many steps the student answers the held-out problems of tiny-arithmetic.
Writes `objectives.json`, after every curve, and `objectives.png` into --out; a second call goes on from there. --runs:
where `distill run tiny` has been, if it has.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from learning_curve import BAR, answered, difference, save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# With one tokenizer softened, as the teacher is nearly certain: what it says beyond its traces is in the small numbers.
# Across tokenizers those are the ones that are aligned worst, and softening makes them large.
PAIRS: dict[str, dict[str, Any]] = {
    "one tokenizer": {"steps": 240, "every": 30, "temperature": 4.0},
    "two tokenizers": {"steps": None, "every": 60, "temperature": 1.0},
}
OBJECTIVES = ("sft", "logits")


def distil(out: Path, runs: Path | None) -> Path:
    """The run directory of `distill run tiny`."""
    directory = (runs or out) / "tiny"
    if not (directory / "student").exists():
        subprocess.run([sys.executable, str(ROOT / "cli.py"), "run", "tiny", "--run-dir", str(directory)], check=True)
    return directory


def recipe_of(teacher: str, objective: str, temperature: float, seed: int, steps: int | None) -> Any:
    from distill.catalog import load_recipe

    fields = {"kind": objective} | ({"temperature": temperature} if objective == "logits" else {})
    train = [f"train.objective={json.dumps(fields)}", f"train.seed={seed}", f"train.max_steps={json.dumps(steps)}"]
    return load_recipe("tiny", [f"teacher={teacher}", "train.save_steps=100000", *train])


def card_of_the_student(out: Path, tiny: Path) -> Path:
    """The distilled student's card as a teacher."""
    card = out / "distilled.yaml"
    fields = {
        "name": "tiny-distilled",
        "family": "qwen2",
        "weights": str((tiny / "student").absolute()),
        "parameters": 0.00086,
        "active_parameters": 0.00086,
        "context": 4096,
        "license": "mit",
    }
    card.write_text(yaml.safe_dump(fields))
    return card


def taught_by_the_student(out: Path, tiny: Path) -> Path:
    """Make a run directory with traces of the distilled student. Returns its card as a teacher."""
    from distill.catalog import load_recipe
    from distill.pipeline import run_recipe

    card = card_of_the_student(out, tiny)
    recipe = load_recipe("tiny", [f"teacher={card}"])
    run_recipe(recipe, out / "one", ["generate", "filter"])  # a second call finds them finished
    return card


def curve(
    run: Path, teacher: str, objective: str, seed: int, out: Path, *, steps: int | None, every: int, temperature: float
) -> list[dict[str, Any]]:
    """Train in this process; pass@1 and tokens after every so many steps, and which problems were right in the end."""
    import torch

    from distill.artefacts import RunPaths
    from distill.models import Models
    from distill.train.learn.fit import Task, build
    from distill.train.learn.loop import Loop
    from distill.train.ranks.checkpoint import Checkpoints
    from distill.train.ranks.world import World
    from distill.train.rows.feed import StoredFeed
    from distill.train.rows.prepare import prepare

    recipe = recipe_of(teacher, objective, temperature, seed, steps)
    models, paths = Models(recipe, run), RunPaths(run)
    weights = models.base.directory
    rows = prepare(recipe, models, paths, recipe.train.row_settings(), {"teacher": teacher})
    world = World()
    torch.manual_seed(seed)
    built = build(Task(recipe, models, paths), world)
    loop = Loop(
        built.learner,
        StoredFeed(rows, recipe.train),
        recipe.train,
        Checkpoints(out / "log", 1),
        world,
        laid_out=built.wrapped,
    )
    points = []
    while loop.position.step < loop.total:
        loop.step()
        if loop.position.step % every == 0 or loop.position.step == loop.total:
            loop.settle()
            place = out / "student"
            save(loop, weights, place)
            right = answered(place, "tiny-arithmetic")
            score = sum(right) / len(right)
            points.append({"step": loop.position.step, "tokens": loop.position.supervised_tokens, "pass@1": score})
            print(f"  step {loop.position.step}: {points[-1]['tokens']:,} tokens, pass@1 {score:.1%}", flush=True)
    points[-1]["right"] = right
    return points


def tokens_to(points: list[dict[str, float]], bar: float) -> float | None:
    """Supervised tokens at which a curve first reaches the bar, between two points by a straight line."""
    before = {"tokens": 0.0, "pass@1": 0.0}
    for point in points:
        if point["pass@1"] >= bar:
            share = (bar - before["pass@1"]) / (point["pass@1"] - before["pass@1"])
            return before["tokens"] + share * (point["tokens"] - before["tokens"])
        before = point
    return None


def draw(curves: dict[str, dict[str, list[list[dict[str, Any]]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(9, 3.6), sharey=True)
    for axis, (pair, by_objective) in zip(axes, curves.items(), strict=True):
        for objective, color in zip(OBJECTIVES, ("#8a8f98", "#1f6feb"), strict=True):
            for number, points in enumerate(by_objective[objective]):
                axis.plot(
                    [point["tokens"] / 1000 for point in points],
                    [100 * point["pass@1"] for point in points],
                    color=color,
                    alpha=0.85,
                    linewidth=1.4,
                    label=objective if number == 0 else None,
                )
        axis.axhline(100 * BAR, color="#d0d4da", linewidth=0.8, zorder=0)
        axis.set_title(pair)
        axis.set_xlabel("supervised tokens, thousands")
    axes[0].set_ylabel("pass@1, %")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tiny = distil(args.out, args.runs)
    card = taught_by_the_student(args.out, tiny)
    pairs = {"one tokenizer": (args.out / "one", str(card)), "two tokenizers": (tiny, "tiny-r1")}
    curves: dict[str, dict[str, list[list[dict[str, Any]]]]] = {pair: {o: [] for o in OBJECTIVES} for pair in pairs}
    file = args.out / "objectives.json"
    if file.exists():
        found = json.loads(file.read_text())
        if found["settings"] != PAIRS:
            sys.exit(f"error: {file} was made with other settings ({found['settings']}); give another --out")
        curves = found["curves"]
    for seed in range(args.seeds):
        for pair, (run, teacher) in pairs.items():
            for objective in OBJECTIVES:
                if len(curves[pair][objective]) > seed:
                    continue
                print(f"seed {seed}, {pair}, {objective}", flush=True)
                points = curve(run, teacher, objective, seed, args.out / "work", **PAIRS[pair])
                curves[pair][objective].append(points)
                file.write_text(json.dumps({"settings": PAIRS, "curves": curves}) + "\n")
    draw(curves, args.out / "objectives.png")
    for pair, by_objective in curves.items():
        for objective, runs in by_objective.items():
            reached = [tokens_to(points, BAR) for points in runs]
            last = [points[-1]["pass@1"] for points in runs]
            shown = ", ".join("never" if tokens is None else f"{tokens:,.0f}" for tokens in reached)
            print(f"{pair}, {objective}: {BAR:.0%} after {shown} tokens; at the end {statistics.mean(last):.1%} {last}")
        if all("right" in points[-1] for runs in by_objective.values() for points in runs):
            rights = ([points[-1]["right"] for points in by_objective[objective]] for objective in ("logits", "sft"))
            made = difference(*rights)
            shown = f"{100 * made.value:+.2f} points, 95 %: {100 * made.low:+.2f} to {100 * made.high:+.2f}"
            print(f"{pair}, logits less sft at the end: {shown}")


if __name__ == "__main__":
    main()
