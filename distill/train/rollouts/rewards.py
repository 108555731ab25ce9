"""Rewards of rollouts: rules, not a reward model, as R1-Zero was trained (arXiv 2501.12948, section 2.2.2).

A reward is a weighted sum of parts, whose weights are `train.objective.rewards`:

  correct   1 if the grader of the prompt's task accepts the answer, else 0
  format    1 for exactly one closed think block with text in it, followed by an answer in a place that the grader
            reads as the answer (`Answer.marked`), else 0. A guess of the grader (the last number of a line) is none.
            For a task without a grader, any text after the block
  language  share of the reasoning's characters that stay in the language of the prompt (R1's language consistency),
            by the rules of `filter.language`; a rollout without reasoning is measured whole, an empty one gets 0
  length    0 up to four fifths of `max_new_tokens`, from there linearly down to −1 (DAPO's soft overlong punishment,
            arXiv 2503.14476, equation 13, with the paper's ratio of buffer to limit)

*Unverifiable is no reward and no penalty.* If the grader cannot decide (no gold answer, no answer that it can find, a
timeout), the rollout has no value at all and leaves its group. Counting it as wrong would teach the student to avoid
what the grader cannot read, and counting its other parts alone would compare it with rollouts that could earn more.

A rollout that was cut off at the token limit is not correct, unless its answer stands: an answer stands if no
continuation changes it. `The answer is 4` may have become 42, `\\boxed{4}` and a closed code block may not. The test
is to append a digit and to look for the answer again, which works for every grader. The rollout is then graded like
any other. Rejected: giving no value to every rollout that was cut off, which rewards thinking on where the student
does not know the answer.

Parts with weight 0 are not computed. The graders' processes live as long as the `Rewarder`, for the whole training.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from distill.console import say
from distill.errors import UserError
from distill.filters.base import Candidate
from distill.filters.format import Format
from distill.filters.language import foreign
from distill.grading import GRADERS, Answer, Grade, Grader, require_grader
from distill.grading.grade import AnswerJudge
from distill.grading.judged import JUDGE
from distill.grading.mixed import graded, require_judge
from distill.grading.sandbox.levels import Level, require_level
from distill.objectives.grpo import Rewards
from distill.prompts.prompt import END_THINK, THINK, Prompt
from distill.traces.rewarded import Reward
from distill.traces.trace import Trace

BUFFER = 0.2  # share of the token limit in which the length part falls: DAPO has 4,096 of 20,480 tokens
WHERE = "train.objective.rewards.correct"


class Rewarder:
    """Computes rewards of rollouts. A context manager, which owns the graders' processes.

    max_new_tokens: the token limit of the rollouts. workers, timeout, level: as `Grader` has them. judge: grades the
    prompts of task `judge`; its owner opens and closes it.
    """

    def __init__(
        self,
        weights: Rewards,
        max_new_tokens: int,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        level: Level = "full",
        judge: AnswerJudge | None = None,
    ) -> None:
        self.weights, self.max_new_tokens = weights, max_new_tokens
        self._grader = Grader(workers, timeout, level=level)
        self._judge = judge
        self._format = Format()
        self._stack = ExitStack()

    def __enter__(self) -> "Rewarder":
        if self.weights.correct:
            self._stack.enter_context(self._grader)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def rewards(self, traces: Sequence[Trace]) -> list[Reward]:
        """The reward of each rollout, in order.

        Errors: UserError for a task without a grader; WorkError if a grading process cannot be started, or the judge's
        requests fail.
        """
        grades = self._grades(traces) if self.weights.correct else {}
        return [self._reward(trace, grades.get(i)) for i, trace in enumerate(traces)]

    def _grades(self, traces: Sequence[Trace]) -> dict[int, Grade]:
        """The grade of each rollout, by its place."""
        grades: dict[int, Grade] = {}
        items: list[tuple[int, Prompt, str]] = []
        for i, trace in enumerate(traces):
            if is_truncated(trace) and _gradable(trace.prompt) and _answer(trace) is None:
                grades[i] = Grade("wrong", "truncated")
            else:
                items.append((i, trace.prompt, trace.answer))
        return grades | dict(graded(self._grader, self._judge, items))

    def _reward(self, trace: Trace, grade: Grade | None) -> Reward:
        weights = self.weights
        parts: dict[str, float] = {}
        correct = None if grade is None or grade.verdict == "unverifiable" else grade.verdict == "correct"
        if correct is not None:
            parts["correct"] = float(correct)
        if weights.format:
            parts["format"] = float(self._has_format(trace))
        if weights.language:
            parts["language"] = language_consistency(trace)
        if weights.length:
            parts["length"] = overlong(trace.tokens, self.max_new_tokens)
        if weights.correct and correct is None:
            return Reward(None, None, parts)
        return Reward(sum(getattr(weights, name) * part for name, part in parts.items()), correct, parts)

    def _has_format(self, trace: Trace) -> bool:
        answer = _answer(trace)
        placed = not is_truncated(trace) if trace.prompt.task not in GRADERS else answer is not None and answer.marked
        return placed and self._format.judge(Candidate(trace)).keep


def is_truncated(trace: Trace) -> bool:
    """Whether a rollout was cut off at the token limit."""
    return trace.finish_reason == "length"


def language_consistency(trace: Trace) -> float:
    """The share of the reasoning's characters, 0 to 1, that stay in the language of the prompt. Code, formulas and
    white space count as staying. Of a rollout without a closed think block the whole text is measured."""
    text = trace.text if trace.reasoning is None else trace.reasoning
    text = text.replace(THINK, " ").replace(END_THINK, " ")
    return 1.0 - foreign(trace.prompt, text)[0] if text.strip() else 0.0


def overlong(tokens: int, limit: int) -> float:
    """The length part of a rollout of `tokens` completion tokens, from −1 at the limit to 0."""
    start = (1 - BUFFER) * limit
    return -min(1.0, max(0.0, (tokens - start) / (limit - start)))


def check_gradable(
    prompts: Iterable[Prompt], weights: Rewards, *, level: Level = "full", has_judge: bool = False
) -> None:
    """Refuse prompts whose rollouts could never be rewarded; reads every prompt once.

    Prints a line if some of a task's prompts have no gold answer. Errors: UserError if there are no prompts, a task has
    no grader, none of a task's prompts has a gold answer, a judge is needed and there is none, or this machine isolates
    programs less than `level`.
    """
    if not weights.correct:
        return
    totals: dict[str, int] = {}
    lacking: dict[str, int] = {}
    for prompt in prompts:
        task = prompt.task
        if task not in totals:
            require_judge([task], has_judge, WHERE)
            require_grader(task, WHERE, "leave such prompts out, or set it to 0")
        totals[task] = totals.get(task, 0) + 1
        if not _gradable(prompt):
            lacking[task] = lacking.get(task, 0) + 1
    if not totals:
        raise UserError("prompts: there is no prompt for the student to answer; add a source, or raise its `limit`")
    for lacked, count in lacking.items():
        if count == totals[lacked]:
            raise UserError(
                f"{WHERE}: none of the {count:,} prompts of task {lacked} has a gold answer, so no rollout could be "
                f"rewarded; name the column with the answers (prompts.N.answer), or set train.objective.kind to "
                f"`on_policy`, which needs none"
            )
    if missing := sum(lacking.values()):
        say(f"rewards: {missing:,} of {sum(totals.values()):,} prompts have no gold answer; their rollouts get none")
    if "code" in totals:
        require_level(level, "filter.correct.sandbox")


def _gradable(prompt: Prompt) -> bool:
    """Whether there is something that an answer can be held against: a gold answer, or a judge."""
    return prompt.task == JUDGE or bool(GRADERS[prompt.task].gold(prompt.answer or ""))


def _answer(trace: Trace) -> Answer | None:
    """The answer that the grader finds in a rollout; None if there is none, the rollout was cut off inside it, or the
    task has no grader."""
    if (grader := GRADERS.get(trace.prompt.task)) is None:
        return None
    gold = grader.gold(trace.prompt.answer or "")
    answer = grader.find_for(gold, trace.answer)
    if is_truncated(trace) and answer is not None and grader.find_for(gold, trace.answer + "0") != answer:
        return None
    return answer
