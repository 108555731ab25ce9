"""Proves that no held-out problem stands in any training text of the tiny pair, in any order of its operands.

The texts of both builders are written again from the seed and step count in their committed logs, and the distillation
prompts of `recipes/tiny.yaml` are added. From each text, not from the record it was made from, every chain is read:
expressions as they stand, equations joined where one goes on from the result of another, a story's sentences, and the
lines that say what a story told.
All chains inside those count too. Then the held-out problems, the benchmark's and more, are looked up.

    python tools/prove_heldout.py [--heldout N]        exits with 1 and names the problem and the text if one is found
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from types import ModuleType
from typing import NamedTuple

import build_tiny_student
import build_tiny_teacher
from tiny_pair import ROOT, Document, documents, trace

from distill.catalog import load_benchmark, load_recipe
from distill.prompts.arithmetic import GAINS, LOSSES, MIN_STEPS, Chain, Problem, problems

EXPRESSION = re.compile(r"\d+(?: [+-] \d+)+")
EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
GAIN_WORDS, LOSS_WORDS = ("|".join(phrase.split(" {n}")[0] for phrase in phrases) for phrases in (GAINS, LOSSES))
SENTENCE = re.compile(rf"has (\d+) |(?:{LOSS_WORDS}) (\d+)|(?:{GAIN_WORDS}) (\d+)")
DAY_LINE = re.compile(r"Start (\d+)|On \w+ ([+-]) (\d+)")


def chains(text: str) -> Iterator[Chain]:
    """Every chain that can be read in a text, longest forms only (`inside` takes them apart)."""
    for found in EXPRESSION.finditer(text):
        yield tuple(int(n.replace(" ", "")) for n in re.findall(r"(?:^|[+-] )\d+", found[0]))
    joined: list[int] = []
    result = None
    for a, sign, b, c in EQUATION.findall(text):
        if result != a:
            yield tuple(joined)
            joined = [int(a)]
        joined.append(int(sign + b))
        result = c
    yield tuple(joined)
    told: list[int] = []
    for start, lost, gained in SENTENCE.findall(text):
        told.append(int(start or gained or -int(lost)))
    yield tuple(told)
    yield tuple(int(start or sign + n) for start, sign, n in DAY_LINE.findall(text))


def inside(chain: Chain) -> Iterator[Chain]:
    """A chain's consecutive parts: begun at an operand, or at the running value that the working shows there."""
    total = 0
    for begin, operand in enumerate(chain):
        total += operand
        for end in range(begin + MIN_STEPS + 1, len(chain) + 1):
            yield (abs(operand), *chain[begin + 1 : end])
            yield (total, *chain[begin + 1 : end])


class Found(NamedTuple):
    texts: int
    chains: int
    found: Problem | None
    text: str


def search(texts: Iterable[str], heldout: dict[Chain, Problem]) -> Found:
    """Read texts until one shows a held-out problem; `heldout` is keyed by the sorted operands."""
    count = seen = 0
    for text in texts:
        count += 1
        for chain in chains(text):
            for part in inside(chain):
                seen += 1
                if (problem := heldout.get(tuple(sorted(part)))) is not None:
                    return Found(count, seen, problem, text)
    return Found(count, seen, None, "")


def training_documents(builder: ModuleType, folder: str) -> Iterator[Document]:
    """Every document that the committed weights were trained on, from the seed and steps in their log."""
    rows = [json.loads(line) for line in (ROOT / folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if "seed" in row:  # the head of a run, or of the run that resumed it
            assert (row["seed"], row["batch"]) == (builder.SEED, builder.BATCH), f"{folder} was built by another script"
    return documents(builder.draw, builder.SEED, max(row.get("step", 0) for row in rows), builder.BATCH)


def distillation_texts() -> Iterator[str]:
    """The prompts the teacher answers, and the working that a right trace has (the filters drop wrong ones)."""
    for source in load_recipe("tiny").prompts:
        assert source.kind == "procedural"
        for problem in problems(source.split, source.seed, source.limit):
            yield f"{problem.question}\n{trace(problem)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heldout", type=int, default=5000, help="held-out problems to look for")
    parser.add_argument("--documents", type=int, help="read only so many documents of each model")
    args = parser.parse_args()
    card = load_benchmark("tiny-arithmetic").prompts
    assert card.kind == "procedural" and card.split == "heldout" and card.limit <= args.heldout
    heldout = {tuple(sorted(p.chain)): p for p in problems(card.split, card.seed, args.heldout)}
    sources: dict[str, Iterable[str]] = {
        folder: (d.text for d in islice(training_documents(builder, folder), args.documents))
        for builder, folder in ((build_tiny_teacher, "teachers/tiny-r1"), (build_tiny_student, "students/tiny-qwen"))
    }
    for name, texts in (sources | {"the prompts of recipes/tiny.yaml": distillation_texts()}).items():
        result = search(texts, heldout)
        if result.found:
            sys.exit(f"{name}: held-out {result.found.expression} stands in the training text {result.text!r}")
        print(f"{name}: {result.texts:,} texts, {result.chains:,} chains, none of {len(heldout):,} held-out problems")


if __name__ == "__main__":
    main()
