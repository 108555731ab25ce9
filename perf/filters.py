"""The filter stage on traces as long as R1's: traces a second and peak memory at two sizes; and MinHash beside a peer.

    python perf/filters.py [--json FILE] [--work DIR] [--sizes 10000,100000] [--seed N] [--set KEY=VALUE …]
        [--no-peer]

The traces are synthetic, from a seed: lengths as those of R1 on mathematics (log-normal, mean some 3,900 tokens, a tail
up to 32,768), four samples of a prompt, stored in the order in which they would finish; most are right, three in ten of
those in another spelling that needs the parser, the others are wrong, cut off, without an answer or without a closed
block; one in a hundred is a copy of another sample. They are written once and kept.

`distill filter` runs on each size in a process of its own, with the profile `math` and every other filter that can
judge such traces: decontamination against 1,319 problems, pass rates, near-duplicates of prompts and of completions,
the most diverse two of four samples. `--set` adds to that or takes away (`--set filter.near_answers=false`). Its
memory is the proportional set size (`Pss` in `/proc/PID/smaps_rollup`) of the process and all its descendants,
sampled five times a second; a page that several processes share counts once. Before that every filter judges the same
few traces in this process, for its own milliseconds a trace; grading, which happens in processes of its own, is not
among these figures.

`perf/minhash.py` compares MinHash with datatrove, which `perf/requirements.txt` installs; `--no-peer` leaves it out.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import minhash
import numpy as np
from memory import watch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SAMPLES = 4
MEDIAN, SIGMA, LONGEST = 2600, 0.9, 32768  # tokens
CHARACTERS = 3.6  # of a token
PROBLEMS = 1319  # of the benchmark that prompts are compared with, as many as GSM8K's
TIMED = 300  # traces on which each filter is timed alone
FUNCTION_WORDS = ("the", "of", "is", "that", "and", "to", "we", "so", "in", "it", "this", "then")
WORDS = re.findall(
    r"\w+",
    "let us the we so then value number sum product equation root triangle angle side length square "
    "check wait again maybe consider because therefore each term factor prime modulo remainder case "
    "total answer simplify substitute gives hence suppose integer positive circle radius area coordinate "
    "point line segment sequence next previous first second divide both sides expand collect compare "
    "bound maximum minimum probability choose ways count pairs even odd",
)
RIGHT = {r"\frac{1}{2}": ("0.5", r"\dfrac12", "1/2"), "12": ("12.0", "12"), r"2\sqrt{3}": (r"\sqrt{12}", r"2 \sqrt{3}")}


# ---- synthetic traces


def word(rng: random.Random) -> str:
    """A word or a figure; as in real solutions, about four words of ten are function words."""
    draw = rng.random()
    return str(rng.randrange(1000)) if draw < 0.2 else rng.choice(FUNCTION_WORDS if draw < 0.55 else WORDS)


def sentences(rng: random.Random, number: int) -> list[str]:
    """Sentences of words and figures."""
    made = []
    for _ in range(number):
        words = [word(rng) for _ in range(rng.randint(6, 20))]
        made.append(" ".join(words).capitalize() + rng.choice([". ", ". ", ".\n\n"]))
    return made


def traces(number: int, seed: int) -> Iterator[object]:
    """Synthetic traces. Those of a smaller number are not the beginning of those of a larger one."""
    from distill.chat import split_reasoning
    from distill.prompts.prompt import Prompt
    from distill.traces.trace import Trace

    rng, draws = random.Random(seed), np.random.default_rng(seed)
    pool = np.array(sentences(rng, 50_000), dtype=object)
    mean = statistics.mean(map(len, pool))
    golds = list(RIGHT)
    order = draws.permutation(number)  # as they finish, not as they were asked
    said: dict[int, str] = {}
    for index in order.tolist():
        question, sample = divmod(index, SAMPLES)
        gold = golds[question % len(golds)]
        prompt = Prompt.from_question(f"Question {question}: {pool[question % len(pool)]}", gold)
        tokens = int(min(LONGEST, MEDIAN * np.exp(SIGMA * draws.standard_normal())))
        body = "".join(pool[draws.integers(0, len(pool), max(3, int(tokens * CHARACTERS / mean)))])
        fate, finish = draws.random(), "stop"
        answer = rng.choice(RIGHT[gold]) if draws.random() < 0.3 else gold
        text = f"<think>\n{body}\n</think>\n\nThe answer is \\boxed{{{answer}}}."
        if fate < 0.02:
            text, finish = f"<think>\n{body}", "length"
        elif fate < 0.04:
            text = f"<think>\n{body}\n</think>\n\nIt is hard to say."
        elif fate < 0.05:
            text = f"{body}\n\n\\boxed{{{answer}}}"
        elif fate < 0.15:
            text = text.replace(f"{{{answer}}}.", "{7}.")
        if fate > 0.99 and question in said:
            text = said.pop(question)
        elif fate > 0.97 and len(said) < 200:
            said[question] = text
        reasoning, response = split_reasoning(text)
        yield Trace(prompt, sample, 0, text, reasoning, response, finish, "synthetic", completion_tokens=tokens)


def write(directory: Path, number: int, seed: int) -> None:
    """Write traces as a run's, as `generate` leaves them."""
    from distill.traces.parts import GROUP_ROWS, PartWriter
    from distill.traces.rows import SCHEMA, table_of

    made = traces(number, seed)
    directory.mkdir(parents=True)
    with PartWriter(directory, SCHEMA) as writer:
        while group := list(islice(made, GROUP_ROWS)):
            writer.write(table_of(group))


def store(work: Path, number: int, seed: int) -> Path:
    """The directory of so many traces, written on first use."""
    directory = work / f"solutions-{number}-{seed}"
    if not directory.exists():
        new = directory.with_name(f"{directory.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        write(new, number, seed)
        new.rename(directory)
    return directory


# ---- measuring


def settings_of(work: Path, seed: int) -> list[str]:
    """The filters that run, as of `--set`."""
    path = work / "problems.jsonl"
    rows = ({"question": text} for text in sentences(random.Random(seed + 1), PROBLEMS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "filter.profile=math",
        f"filter.decontaminate={{benchmarks: [{path.absolute()}]}}",
        "filter.pass_rate={min_rate: 0.1}",
        "filter.near_prompts=true",
        "filter.near_answers=true",
        "filter.select={per_prompt: 2, order: diverse}",
    ]


def milliseconds(settings: list[str], number: int, seed: int) -> dict[str, float]:
    """Filter → processor milliseconds a trace in this process, to judge it or to take the note for a later choice."""
    from distill.catalog import load_recipe
    from distill.filters.base import Candidate, ChoosingFilter, StreamFilter
    from distill.filters.resources import RunResources

    recipe = load_recipe("tiny", settings)
    resources = RunResources(recipe)
    candidates = [Candidate(trace, resources) for trace in islice(traces(number, seed), TIMED)]
    measured = {}
    for each in (*recipe.filter.judging_filters(), *recipe.filter.choosing_filters()):
        if isinstance(each, StreamFilter):
            continue
        each.check(resources)
        judge = each.note if isinstance(each, ChoosingFilter) else each.judge
        begun = time.process_time()
        for candidate in candidates:
            judge(candidate)
        measured[each.name] = 1000 * (time.process_time() - begun) / len(candidates)
    return measured


def run_filter(run: Path, settings: list[str]) -> dict[str, float]:
    """Filter the traces of a run directory: traces a second of the stage and of the whole command, and peak memory."""
    command = [sys.executable, str(ROOT / "cli.py"), "filter", "tiny", "--run-dir", str(run)]
    for setting in settings:
        command += ["--set", setting]
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ) as process:
        peak, when = watch(process)
        seconds = time.perf_counter() - begun
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{output}")
    record = json.loads((run / "stages" / "filter.json").read_text())
    total = record["summary"]["total"]
    return {
        "traces": total,
        "kept": record["summary"]["kept"],
        "traces/s": total / record["seconds"],
        "traces/s of the command": total / seconds,
        "seconds": seconds,
        "peak memory, MB": peak,
        "at second": when,
    }


def begin(directory: Path) -> None:
    """Make a run directory in which `generate` has begun."""
    from distill import generate
    from distill.catalog import load_recipe
    from distill.run import Run

    with Run(directory, load_recipe("tiny")) as run:
        run.begin(generate.STAGE, generate.STAGE.settings(run), {})


def measure(work: Path, number: int, seed: int, settings: list[str]) -> dict[str, float]:
    """Filter so many synthetic traces in a new run directory."""
    source = store(work, number, seed)
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    begin(run)
    (run / "traces").mkdir()
    for part in source.iterdir():
        os.link(part, run / "traces" / part.name)
    return run_filter(run, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf/filters"), help="where the traces are kept")
    parser.add_argument("--sizes", default="10000,100000", help="numbers of traces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `distill filter`")
    parser.add_argument("--no-peer", action="store_true", help="leave out MinHash beside datatrove")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sizes = [int(size) for size in args.sizes.split(",")]
    settings = [*settings_of(args.work, args.seed), *args.set]
    results: dict[str, object] = {"milliseconds a trace": milliseconds(settings, sizes[0], args.seed)}
    if not args.no_peer:
        results["MinHash"] = minhash.compare(minhash.TEXTS, minhash.ROUNDS, args.seed)
    print(json.dumps(results, indent=2), flush=True)
    measured = {}
    for size in sizes:
        measured[size] = results[f"{size:,} traces"] = measure(args.work, size, args.seed, settings)
        print(json.dumps(measured[size], indent=2), flush=True)
    if len(sizes) > 1:
        small, large = measured[sizes[0]], measured[sizes[-1]]
        slope = (large["peak memory, MB"] - small["peak memory, MB"]) / (sizes[-1] - sizes[0])
        results["memory, large ÷ small"] = large["peak memory, MB"] / small["peak memory, MB"]
        results["rate, large ÷ small"] = large["traces/s"] / small["traces/s"]
        results["slope, bytes a trace"] = slope * 2**20
        results["800,000 traces by the slope, MB"] = small["peak memory, MB"] + slope * (800_000 - sizes[0])
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
