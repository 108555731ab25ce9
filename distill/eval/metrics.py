"""pass@k and consensus as `evaluate` metrics, for use without a run: in a notebook, or on somebody else's samples.

    from distill.eval.metrics import ConsensusAtK, PassAtK

    PassAtK().compute(predictions=[[True, False, False, True], [False] * 4], k=2)
    ConsensusAtK().compute(predictions=[["1/2", "0.5", "3"]], references=["\\frac12"])

They compute what `distill eval` computes, and need no network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from distill.eval.statistics import Estimate, Vote, consensus, pass_at_k
from distill.eval.votes import classes
from distill.grading import Grader
from distill.grading.math import final_answer
from distill.prompts.prompt import Prompt


class PassAtK(evaluate.Metric):  # type: ignore[misc]
    """Whether samples were right → pass@k, without bias, and its 95 % interval clustered by problem."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="pass@k of sampled answers, with a 95 % interval clustered by problem",
            citation="Chen et al., 2021, arXiv:2107.03374",
            inputs_description=(
                "predictions: for each problem, whether each of its samples is right. k: how many tries. samples: how "
                "many samples every problem must have; fewer, or fewer than k, is a ValueError."
            ),
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("bool"))}),
        )

    def _compute(self, predictions: Sequence[Sequence[bool]], k: int = 1, samples: int | None = None) -> dict[str, Any]:
        return _told(f"pass@{k}", pass_at_k(predictions, k, samples))


class ConsensusAtK(evaluate.Metric):  # type: ignore[misc]
    """Final answers, or whole completions, and gold answers → cons@k, k being the samples a problem has."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="the share of problems whose most frequent answer is right; ties count by the share that is",
            citation="Wang et al., 2022, arXiv:2203.11171",
            inputs_description=(
                "predictions: for each problem its samples, as final answers or as completions that mark one. "
                "references: the gold answers. Mathematics is compared as such."
            ),
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[str]) -> dict[str, Any]:
        drawn = {len(samples) for samples in predictions}
        if len(drawn) != 1:
            raise ValueError(f"cons@k needs as many samples of every problem; there are {sorted(drawn)}")
        with Grader() as grader:
            graded = dict(
                grader.grade(
                    ((number, sample), Prompt.from_question(str(number), gold), text)
                    for number, (samples, gold) in enumerate(zip(predictions, references, strict=True))
                    for sample, text in enumerate(samples)
                )
            )
            voted = {}
            for number, samples in enumerate(predictions):
                answers = [final_answer(text) for text in samples]
                voted[number] = [answer.text if answer and answer.marked else None for answer in answers]
            numbers = dict(classes(grader, {n: [a for a in of if a is not None] for n, of in voted.items()}))
        votes = [
            [
                Vote(None if answer is None else numbers[n][answer], graded[n, sample].verdict == "correct")
                for sample, answer in enumerate(of_one)
            ]
            for n, of_one in voted.items()
        ]
        made = consensus(votes)
        return _told(f"cons@{drawn.pop()}", made.estimate) | {"ties": made.ties, "silent": made.silent}


def _told(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
