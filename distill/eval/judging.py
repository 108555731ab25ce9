"""The judge of an evaluation: whether a benchmark needs one, what decides its verdicts, and the open judge itself.

What decides the verdicts is stored beside the grades, so that the grades of two judges are never mixed. The samples do
not depend on it: another judge grades the same ones.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from distill.artefacts import Settings
from distill.eval.benchmark import Benchmark
from distill.grading.grade import AnswerJudge
from distill.grading.judge import JudgeModel, check_budget, judge_identity
from distill.grading.judged import JUDGE
from distill.grading.mixed import require_judge
from distill.models import judge_of

if TYPE_CHECKING:
    from distill.recipe import Judge, LocalEngine

ELSEWHERE = ("teacher", "server", "sampling", "seed")  # what `judge_identity` says of the model and its sampling


def check_judge(benchmarks: Sequence[Benchmark], settings: "Judge | None") -> bool:
    """Whether a benchmark needs the judge. Errors: UserError where it needs one and there is none."""
    for benchmark in benchmarks:
        require_judge([benchmark.card.task], settings is not None, f"benchmark {benchmark.name}")
    needed = any(benchmark.card.task == JUDGE for benchmark in benchmarks)
    if settings is not None and needed:
        check_budget(settings)
    return needed


def judge_settings(benchmarks: Sequence[Benchmark], settings: "Judge | None") -> Settings | None:
    """What decides the verdicts of the judge; None where no benchmark needs one. Errors: UserError where it is missing
    or cannot be used."""
    if not check_judge(benchmarks, settings) or settings is None:
        return None
    rubric = {key: value for key, value in settings.settings().items() if key.partition(".")[0] not in ELSEWHERE}
    return rubric | judge_identity(settings, judge_of(settings))


def opened_judge(
    benchmarks: Sequence[Benchmark], settings: "Judge | None", engine: "LocalEngine", directory: Path
) -> AbstractContextManager[AnswerJudge | None]:
    """The judge, for as long as the block lasts; None where no benchmark needs one. directory: of its judgements."""
    if settings is None or not check_judge(benchmarks, settings):
        return nullcontext()
    return JudgeModel(settings, judge_of(settings), engine, directory, "eval")
