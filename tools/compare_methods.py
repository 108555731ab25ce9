"""Distillation against reinforcement learning on the tiny pair: learning curves of five ways to a student.

    python tools/compare_methods.py --out DIR [--seeds 3] [--methods sft on_policy …]

From the same base:

- `sft`: fine-tuning on the teacher's traces, as `distill run tiny` does it
- `on_policy`: a short cold start by SFT, then the teacher's distributions at the student's own text
- `grpo_from_base`: rewards alone, as R1-Zero was made
- `grpo_from_cold_start`: the same cold start, then rewards
- `pipeline`: R1's: cold start, rewards, SFT on its own right answers, rewards

and, for `on_policy`, a teacher with the student's tokenizer (`one_tokenizer`: the student of `distill run tiny`) beside
tiny-r1 (`across_tokenizers`). Each is a recipe with the settings that `claims.json` lists, trained by the library in a
process of its own; after every so many steps of a phase the student answers the held-out problems of tiny-arithmetic
and of tiny-arithmetic-hard, whose time is not counted. A point has

- `seconds`: of processors, in all processes, since the beginning, and for the traces that were trained on so far, their
  share of generating and filtering
- `produced`: tokens that the teacher generated for the traces trained on so far, those that the filters dropped
  included; `scored`: tokens at which it gave its distribution; `trained`: tokens with a loss. All are tokens of the
  student.

Writes `claims.json` and `claims.png` into --out. A method and seed that is done is not repeated (`curves.json`), unless
its settings have changed; one that was interrupted begins again. Two hours on two cores with three seeds.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_objectives import card_of_the_student, distil
from learning_curve import AXES, BAR, BENCHMARKS, Point, base_point, difference, train, with_interval

ROOT = Path(__file__).resolve().parent.parent

COLD_START = {"name": "cold-start", "max_steps": 60}
ON_POLICY = {
    "name": "on-policy",
    "objective": {"kind": "on_policy", "rollouts": {"prompts_per_step": 32, "sampling": {"max_new_tokens": 128}}},
    "max_steps": 140,
    "learning_rate": 1e-3,
}
REWARDS = {
    "name": "rewards",
    "objective": {
        "kind": "grpo",
        "rollouts": {"prompts_per_step": 16, "samples": 8, "sampling": {"max_new_tokens": 128}},
    },
    "max_steps": 120,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
}
OWN_ANSWERS = {"name": "own-answers", "data": [{"kind": "own", "samples": 2}], "max_steps": 120, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Method:
    """A recipe: `tiny` with these settings. points: evaluations of each phase. teacher: whose traces it begins with,
    `tiny-r1` or `distilled`, the student of `distill run tiny`."""

    settings: dict[str, Any] = field(default_factory=dict)
    points: int = 3
    teacher: str = "tiny-r1"


METHODS = {
    "sft": Method(points=7),
    "on_policy": Method({"train.phases": [COLD_START, ON_POLICY]}),
    "grpo_from_base": Method({f"train.{key}": value for key, value in REWARDS.items() if key != "name"}),
    "grpo_from_cold_start": Method({"train.phases": [COLD_START, REWARDS]}),
    "pipeline": Method(
        {
            "train.phases": [
                COLD_START,
                REWARDS | {"max_steps": 40},
                OWN_ANSWERS,
                REWARDS | {"name": "rewards-again", "max_steps": 40},
            ]
        },
        points=2,
    ),
    "one_tokenizer": Method({"train.phases": [COLD_START, ON_POLICY]}, teacher="distilled"),
}
CLAIMED = tuple(name for name in METHODS if name != "one_tokenizer")
COLOURS = ("#8a8f98", "#1f6feb", "#d29922", "#cf5f2a", "#2da44e")


def settings_of(method: Method, seed: int, teacher: str) -> list[str]:
    """The overrides of the recipe `tiny`, as of `--set`."""
    settings = {"teacher": teacher, "train.seed": seed, "train.save_steps": 10**6, **method.settings}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def one_curve(method: Method, seed: int, run: Path, out: Path, teacher: str) -> dict[str, Any]:
    """Train with one method and seed in a copy of `run`, whose traces are kept, in a process of its own.

    teacher: as a recipe names it; the curve has the method's name of it, which is the same on every machine.
    """
    settings = settings_of(method, seed, teacher)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(".lock"))
    command = [sys.executable, __file__, "--out", str(out), "--train", json.dumps([settings, method.points])]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: the training in {out} failed")
    curve: dict[str, Any] = json.loads((out / "curve.json").read_text())
    shutil.rmtree(out)
    return {"seed": seed, "set": settings_of(method, seed, method.teacher), **curve}


def final(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The last scores of all seeds, which are samples of the same problems, and the medians of what 85 % took."""
    scores = {}
    for name in BENCHMARKS:
        rights = [seed["right"][name] for seed in seeds]
        scores[name] = with_interval([list(samples) for samples in zip(*rights, strict=True)])
    to_bar = {}
    for axis in AXES:
        values = [seed["to_85"][axis] for seed in seeds]
        to_bar[axis] = None if None in values else statistics.median(values)
    return {**scores, "to_85": to_bar}


def compared(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The last scores of one method less those of another, by benchmark."""
    made = {}
    for name in BENCHMARKS:
        less = difference(*([seed["right"][name] for seed in seeds] for seeds in (first, second)))
        made[name] = {"value": less.value, "low": less.low, "high": less.high}
    return made


def report(claims: dict[str, Any], out: Path) -> None:
    """Summarise the curves in `claims`, write them and the plot, print the last scores."""
    methods = {name: curves for name, curves in claims["curves"].items() if curves["seeds"]}
    for name, method in methods.items():
        method["final"] = final(method["seeds"])
        scores = ", ".join(
            f"{benchmark} {method['final'][benchmark]['value']:.1%} ({method['final'][benchmark]['low']:.1%} to "
            f"{method['final'][benchmark]['high']:.1%})"
            for benchmark in BENCHMARKS
        )
        print(f"{name}: {scores}; to {BAR:.0%}: {method['final']['to_85']}")
    claims["methods"] = {name: methods[name] for name in CLAIMED if name in methods}
    if {"on_policy", "sft"} <= methods.keys():
        claims["on_policy_less_sft"] = compared(methods["on_policy"]["seeds"], methods["sft"]["seeds"])
    if {"on_policy", "one_tokenizer"} <= methods.keys():
        across, one = methods["on_policy"], methods["one_tokenizer"]
        claims["tokenizers"] = {
            "across_tokenizers": across["final"],
            "one_tokenizer": one,
            "across_less_one": compared(across["seeds"], one["seeds"]),
        }
    for method in methods.values():
        for seed in method["seeds"]:  # a problem is a character, not a line
            seed["right"] = {name: "".join("01"[right] for right in rights) for name, rights in seed["right"].items()}
    written = {key: value for key, value in claims.items() if key != "curves"}
    (out / "claims.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(claims["methods"], claims["base"], out / "claims.png")


def traces_of(run: Path, teacher: str) -> Path:
    """A run directory of `tiny` with traces of this teacher, filtered, and with the processor seconds that took."""
    if not (run / "cost.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for stage in ("generate", "filter"):
            command = [sys.executable, str(ROOT / "cli.py"), stage, "tiny", "--run-dir", str(run)]
            subprocess.run([*command, "--set", f"teacher={teacher}"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (run / "cost.json").write_text(json.dumps({"seconds": round(seconds, 1)}))
    return run


def draw(methods: dict[str, Any], base: Point, path: Path) -> None:
    """pass@1 over processor seconds, tokens of the teacher and trained tokens; a band is the interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = {
        "seconds": ("processor seconds", 1),
        "teacher": ("tokens the teacher wrote or scored, thousands", 1000),
        "trained": ("tokens trained on, thousands", 1000),
    }
    figure, panels = pyplot.subplots(
        len(BENCHMARKS), len(axes), figsize=(11, 5.6), sharey="row", sharex="col", height_ratios=(3, 1)
    )
    for row, benchmark in zip(panels, BENCHMARKS, strict=True):
        for panel, (axis, (label, unit)) in zip(row, axes.items(), strict=True):
            for (name, method), colour in zip(methods.items(), COLOURS, strict=False):
                for number, seed in enumerate(method["seeds"]):
                    points = [base, *seed["points"]]
                    x = [point[axis] / unit for point in points]
                    scores = [point[benchmark] for point in points]
                    shown = name.replace("_", " ") if number == 0 else None
                    panel.plot(x, [100 * s["value"] for s in scores], color=colour, linewidth=1.3, label=shown)
                    low, high = ([100 * score[end] for score in scores] for end in ("low", "high"))
                    panel.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)
            panel.spines[["top", "right"]].set_visible(False)
            if benchmark == BENCHMARKS[-1]:
                panel.set_xlabel(label)
        row[0].set_ylabel(f"{benchmark}\npass@1, %")
    for panel in panels[0]:
        panel.axhline(100 * BAR, color="#d0d4da", linewidth=0.8, zorder=0)
    panels[0][-1].legend(frameon=False, fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train what is missing, then summarise and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        settings, points = json.loads(args.train)
        (args.out / "curve.json").write_text(json.dumps(train(settings, args.out, points)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    teachers = {"tiny-r1": "tiny-r1"}
    if "one_tokenizer" in args.methods:
        teachers["distilled"] = str(card_of_the_student(args.out, distil(args.out, None)).absolute())
    runs = {name: traces_of(args.out / f"traces-{name}", teacher) for name, teacher in teachers.items()}
    file = args.out / "curves.json"
    if file.exists():
        claims: dict[str, Any] = json.loads(file.read_text())
    else:
        claims = {"base": base_point(ROOT / "students" / "tiny-qwen"), "curves": {}}
    for seed in range(args.seeds):
        for name in args.methods:
            method, done = METHODS[name], claims["curves"].setdefault(name, {"seeds": []})
            if any(curve["set"] == settings_of(method, seed, method.teacher) for curve in done["seeds"]):
                continue
            print(f"seed {seed}, {name}", flush=True)
            curve = one_curve(method, seed, runs[method.teacher], args.out / "work", teachers[method.teacher])
            others = [other for other in done["seeds"] if other["seed"] != seed]
            done["seeds"] = sorted([*others, curve], key=lambda curve: curve["seed"])
            file.write_text(json.dumps(claims) + "\n")
    report(claims, args.out)


if __name__ == "__main__":
    main()
