"""Measure the graders on the labelled sets: rates for each set and kind, and every miss.

    python tools/measure_grading.py [--data DIR] [--cases FILE] [SET …]

A miss is a verdict that the set does not allow: for labelled pairs, `correct` where the label is "different", and
`wrong` or `unverifiable` where it is "equal". An unverifiable answer to a pair labelled "different" is not a miss, but
it is counted. Pairs without a label are left out. Pairs "with options" follow
other conventions, such as rounding to two decimals.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.grading import Grader
from distill.prompts.prompt import Prompt

Row = dict[str, object]
EQUAL, DIFFERENT = frozenset({"correct"}), frozenset({"wrong", "unverifiable"})


@dataclass(frozen=True)
class Case:
    """A gold answer, a response to grade, and the verdicts that are right."""

    name: str
    kind: str
    task: str
    gold: str
    response: str
    allowed: frozenset[str]


def lines(path: Path) -> Iterator[dict[str, object]]:
    """The rows of a JSONL file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def pairs(path: Path, box: bool) -> Iterator[Case]:
    """Labelled pairs of a gold answer and a prediction; box: predictions are bare answers, not responses."""
    for row in lines(path):
        if row["equivalent"] is not None:
            response = rf"\boxed{{{row['pred']}}}" if box else str(row["pred"])
            kind = str(row.get("kind", str(row["id"]).partition(".")[0]))
            allowed = EQUAL if row["equivalent"] else DIFFERENT
            kind += " with options" if row.get("options") else ""
            yield Case(str(row["id"]), kind, "math", str(row["gold"]), response, allowed)


def solutions(path: Path) -> Iterator[Case]:
    """GSM8K solutions of four models with their authors' labels; the answer follows `A:`."""
    for number, row in enumerate(lines(path)):
        gold = str(row["ground_truth"]).rpartition("\nA:")[2].strip()
        for kind, sample in row.items():
            if isinstance(sample, dict):
                allowed = EQUAL if sample["is_correct"] else DIFFERENT
                yield Case(f"{number} {kind}", kind, "math", gold, sample["solution"], allowed)


def traces(folder: Path) -> Iterator[Case]:
    """Reasoning traces of a small model with the score of another grader."""
    for name in ("gsm8k", "mixed"):
        for row in lines(folder / f"{name}.jsonl"):
            allowed = EQUAL if row["score"] else DIFFERENT
            key = f"{row['dataset']} {row['idx']}"
            yield Case(key, str(row["dataset"]), "math", str(row["gt"]), str(row["response"]), allowed)


def collected(path: Path) -> Iterator[Case]:
    """Cases with the verdicts that are allowed."""
    for number, row in enumerate(lines(path)):
        verdicts = row["verdicts"]
        assert isinstance(verdicts, list)
        gold, response = str(row["gold"]), str(row["pred"])
        yield Case(str(number), str(row["kind"]), str(row["task"]), gold, response, frozenset(verdicts))


def measure(name: str, cases: list[Case], grader: Grader) -> None:
    """Print the rates of one set, of its kinds, and its misses."""
    items = [(i, Prompt.from_question("q", case.gold, case.task), case.response) for i, case in enumerate(cases)]
    grades = dict(grader.grade(items))
    misses = [i for i, case in enumerate(cases) if grades[i].verdict not in case.allowed]
    unverifiable = sum(grade.verdict == "unverifiable" for grade in grades.values())
    false_correct = sum(grades[i].verdict == "correct" for i in misses)
    rate = 100 * (1 - len(misses) / len(cases))
    print(
        f"\n{name}: {len(cases)} cases, {rate:.2f} % right, {len(misses)} misses ({false_correct} wrongly correct)",
        end="",
    )
    print(f", {100 * unverifiable / len(cases):.2f} % unverifiable")
    total, missed = Counter(case.kind for case in cases), Counter(cases[i].kind for i in misses)
    for kind, count in missed.items():
        print(f"  {kind}: {count} of {total[kind]} missed")
    for i in misses:
        grade = grades[i]
        shown = f"{grade.evidence['gold']} ← {grade.evidence['extracted']} ({grade.evidence['method']})"
        print(f"    {cases[i].name}: {grade.verdict} ({grade.reason}); {shown}"[:240])
    for i, case in enumerate(cases):
        grade = grades[i]
        if grade.verdict == "unverifiable" and i not in misses and case.allowed != DIFFERENT | EQUAL:
            shown = f"{grade.evidence['gold']} ← {grade.evidence['extracted']}"
            print(f"    unverifiable {case.name} ({grade.reason}); {shown}"[:200])


def main() -> None:
    """Measure the named sets, or all."""
    data = Path(os.environ.get("DISTILL_TEST_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description="rates and misses of the graders on labelled sets")
    parser.add_argument("sets", nargs="*", metavar="SET", help="real, mathverify, gsm8k, traces or cases; default: all")
    parser.add_argument("--data", type=Path, default=data, help="folder of the labelled sets")
    parser.add_argument("--cases", type=Path, help="file of collected cases; default: beside the data")
    options = parser.parse_args()
    data = options.data
    sets = {
        "real": lambda: pairs(data / "grader_pairs_real_dev/pairs.jsonl", box=True),
        "mathverify": lambda: pairs(data / "grader_pairs_mathverify_dev/pairs.jsonl", box=False),
        "gsm8k": lambda: solutions(data / "gsm8k_model_solutions_dev/example_model_solutions.jsonl"),
        "traces": lambda: traces(data / "think_traces_rg3b_dev"),
        "cases": lambda: collected(options.cases or data.parent / "cases/grading.jsonl"),
    }
    with Grader(workers=2, timeout=10.0) as grader:
        for name in options.sets or sets:
            measure(name, list(sets[name]()), grader)


if __name__ == "__main__":
    main()
