"""pass@k and consensus as `evaluate` metrics, for use without a run: in a notebook, or on samples from elsewhere.

    from distill.eval.metrics import ConsensusAtK, PassAtK

    PassAtK().compute(predictions=[[True, False, False, True], [False] * 4], k=2)
    ConsensusAtK().compute(predictions=[["1/2", "0.5", "3"]], references=["\\frac12"])

They compute the same scores as `distill eval`, and need no network.
"""

from collections.abc import Sequence

import datasets
import evaluate

from distill.eval.statistics import Estimate, Vote, consensus, pass_at_k
from distill.grading import Grader
from distill.grading.math import final_answer
from distill.grading.votes import classes
from distill.prompts.prompt import Prompt, split_reasoning

Result = dict[str, float]


class PassAtK(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Unbiased pass@k, with a 95 % interval clustered by problem."""

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

    def _compute(self, predictions: Sequence[Sequence[bool]], k: int = 1, samples: int | None = None) -> Result:
        return _result(f"pass@{k}", pass_at_k(predictions, k, samples))


class ConsensusAtK(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """cons@k of final answers, or of whole completions; k is the number of samples of every problem."""

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

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[str]) -> Result:
        drawn = {len(samples) for samples in predictions}
        if len(drawn) != 1:
            raise ValueError(f"cons@k needs as many samples of every problem; there are {sorted(drawn)}")
        predictions = [[split_reasoning(text)[1] for text in samples] for samples in predictions]
        with Grader() as grader:
            graded = dict(
                grader.grade(
                    ((number, sample), Prompt.from_question(str(number), gold), text)
                    for number, (samples, gold) in enumerate(zip(predictions, references, strict=True))
                    for sample, text in enumerate(samples)
                )
            )
            answers = {
                number: [answer.text if answer and answer.marked else None for answer in map(final_answer, samples)]
                for number, samples in enumerate(predictions)
            }
            marked = {number: [text for text in texts if text is not None] for number, texts in answers.items()}
            numbers = dict(classes(grader, marked))
        votes = [
            [
                Vote(None if text is None else numbers[number][text], graded[number, sample].verdict == "correct")
                for sample, text in enumerate(texts)
            ]
            for number, texts in answers.items()
        ]
        result = consensus(votes)
        return _result(f"cons@{drawn.pop()}", result.estimate) | {"ties": result.ties, "silent": result.silent}


def _result(name: str, estimate: Estimate) -> Result:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
