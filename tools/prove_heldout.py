"""Proves that no held-out problem stands in any training text of the tiny pair, in any order of its operands.

The texts of both builders are written again from the seed and step count in their committed logs, and the distillation
prompts of `recipes/tiny.yaml` are added. From each text, not from the record it was made from, every chain is read:
expressions as they stand, equations joined where one goes on from the result of another, and the story's sentences. All
chains inside those count too. Then the held-out problems (the benchmark's, and as many again as asked for) are looked up.

    python tools/prove_heldout.py [--heldout N]        exits with 1 and names the problem and the text if one is found
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator

import build_tiny_student
import build_tiny_teacher
from tiny_pair import ROOT, Document, documents

from distill.catalog import load_benchmark, load_recipe
from distill.prompts.arithmetic import LOSSES, MIN_STEPS, Chain, problems

EXPRESSION = re.compile(r"\d+(?: [+-] \d+)+")
EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
LOSS_WORDS = "|".join(loss.split(" {n}")[0] for loss in LOSSES)
SENTENCE = re.compile(rf"has (\d+) |({LOSS_WORDS}) (\d+)|(?:buys|finds|gets|wins) (\d+)")


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
    for start, _, lost, gained in SENTENCE.findall(text):
        told.append(int(start or gained or -int(lost)))
    yield tuple(told)


def inside(chain: Chain) -> Iterator[Chain]:
    """A chain's consecutive parts: begun at an operand, or at the running value that the working shows there."""
    total = 0
    for begin, operand in enumerate(chain):
        total += operand
        for end in range(begin + MIN_STEPS + 1, len(chain) + 1):
            yield (abs(operand), *chain[begin + 1 : end])
            yield (total, *chain[begin + 1 : end])


def training_documents() -> Iterator[Document]:
    for builder, folder in ((build_tiny_teacher, "teachers/tiny-r1"), (build_tiny_student, "students/tiny-qwen")):
        first = json.loads((ROOT / folder / "training.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert first["seed"] == builder.SEED and first["batch"] == builder.BATCH, f"{folder} was built by another script"
        yield from documents(builder.draw, builder.SEED, first["steps"], builder.BATCH)


def distillation_texts() -> Iterator[str]:
    """The prompts the teacher answers; its traces work out nothing else, and the filters drop wrong ones."""
    for source in load_recipe("tiny").prompts:
        assert source.kind == "procedural"
        for problem in problems(source.split, source.seed, source.limit):
            yield "\n".join([problem.question, problem.expression, *problem.steps])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heldout", type=int, default=5000, help="held-out problems to look for")
    args = parser.parse_args()
    card = load_benchmark("tiny-arithmetic").prompts
    assert card.kind == "procedural" and card.split == "heldout" and card.limit <= args.heldout
    heldout = {tuple(sorted(p.chain)): p for p in problems(card.split, card.seed, args.heldout)}

    def search(texts: Iterable[str]) -> tuple[int, int]:
        count = seen = 0
        for text in texts:
            count += 1
            for chain in chains(text):
                for part in inside(chain):
                    seen += 1
                    if (found := heldout.get(tuple(sorted(part)))) is not None:
                        sys.exit(f"held-out {found.expression} stands in the training text {text!r}")
        return count, seen

    count, seen = search(document.text for document in training_documents())
    print(f"{count:,} training documents, {seen:,} chains in them: none of {len(heldout):,} held-out problems")
    count, seen = search(distillation_texts())
    print(f"{count:,} distillation prompts, {seen:,} chains in them: none of {len(heldout):,} held-out problems")


if __name__ == "__main__":
    main()
