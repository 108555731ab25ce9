"""Scores of real samples, 100 problems × 8 of a 7B model, against a computation that shares no code with ours."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import pytest

from distill.eval.metrics import ConsensusAtK, PassAtK


@pytest.fixture(scope="module")
def rows(real_data):
    text = real_data("qwen25math_cot100x8/math_cot_100.slim.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def by_definition(correct, k):
    ways = list(itertools.combinations(correct, k))
    return Fraction(sum(any(way) for way in ways), len(ways))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_pass_at_k(rows, k):
    correct = [row["score"] for row in rows]
    made = PassAtK().compute(predictions=correct, k=k, samples=8)
    expected = sum(by_definition(of_one, k) for of_one in correct) / len(correct)
    assert made[f"pass@{k}"] == pytest.approx(float(expected))
    assert made[f"pass@{k}_low"] <= made[f"pass@{k}"] <= made[f"pass@{k}_high"]


def test_sixty_four_samples_are_not_taken_from_eight(rows):
    with pytest.raises(ValueError, match="asked of 64 samples a problem; there are 8"):
        PassAtK().compute(predictions=[row["score"] for row in rows], k=1, samples=64)


def test_consensus(rows):
    """The other grader's extraction and verdicts, answers that are spelled alike counted together. Ours also joins what
    is equal and spelled differently, which can only matter where the spellings share a problem's votes."""
    made = ConsensusAtK().compute(predictions=[row["code"] for row in rows], references=[row["gt"] for row in rows])
    expected = Fraction(0)
    for row in rows:
        counts = Counter(answer for answer in row["pred"] if answer)
        most = max(counts.values(), default=0)
        leaders = [answer for answer, count in counts.items() if count == most]
        right = {answer for answer, good in zip(row["pred"], row["score"], strict=True) if good}
        expected += Fraction(sum(answer in right for answer in leaders), len(leaders)) if leaders else 0
    print(made, float(expected) / len(rows))
    assert made["cons@8"] == pytest.approx(float(expected) / len(rows), abs=1e-9)
