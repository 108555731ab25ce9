"""Where teacher and student put their probability, on the student's own tokens, by kind of span.

Kinds are the reasoning, the `</think>` that closes it, the answer, and the token that ends the turn. A teacher with
another template or another end token reads the same text and finds the student's `</think>` or end of turn impossible;
the mean over all tokens hides it, because such tokens are two of hundreds. So kinds are compared apart, the two single
tokens by their median. What is seen is a warning and not an error: a student before training may end where it should
not, and then the teacher is right.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.chat import END_THINK, THINK, Chat
from distill.errors import UserError
from distill.traces.trace import Trace
from distill.train.rollouts.rewards import is_truncated
from distill.train.rows.align import token_bytes

NEGLIGIBLE = 1e-3  # a median probability below which a token is not expected at all
DISAGREES = 0.1  # share of the student's probability: below it the teacher writes something else there
REASONING, CLOSING, ANSWER, END = "reasoning", END_THINK, "answer", "end of turn"  # kinds of spans

Distribution = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # student's ids, log-probabilities: [s, k] each


class Masses(NamedTuple):
    """Probabilities of the student's token at one position. teacher: None where it is not known."""

    student: float
    teacher: float | None


@dataclass
class Kind:
    """The positions of one kind of span. positions: of each, its masses."""

    positions: list[Masses] = field(default_factory=list)

    @property
    def teacher(self) -> list[float]:
        """The teacher's probabilities, where known."""
        return [each.teacher for each in self.positions if each.teacher is not None]

    @property
    def student(self) -> list[float]:
        """The student's probabilities, where the teacher's are known."""
        return [each.student for each in self.positions if each.teacher is not None]


def compare(
    rollouts: Sequence[Trace], distributions: Sequence[Distribution], student: Chat, teacher: Chat
) -> list[str]:
    """Lines with the probabilities of teacher and student, and warnings where the teacher expects something else.

    distributions: the teacher's, at each token of the rollouts' completions. Errors: UserError where none is known.
    """
    kinds = {kind: Kind() for kind in (REASONING, CLOSING, ANSWER, END)}
    pieces = token_bytes(student.tokenizer, student.where)
    for trace, distribution in zip(rollouts, distributions, strict=True):
        for kind, masses in zip(spans(trace, pieces, student), _masses(trace, distribution), strict=True):
            if kind is not None:
                kinds[kind].positions.append(masses)
    total = sum(len(kind.positions) for kind in kinds.values())
    known = sum(len(kind.teacher) for kind in kinds.values())
    if not known:
        raise UserError(
            f"none of the {total:,} tokens of the rollouts begins where a token of {teacher.where} does: its tokenizer "
            f"changes the text; use another teacher, or set train.objective.kind to `sft`"
        )
    lines = [f"  teacher's distribution: known at {known / total:.1%} of {total:,} tokens; mean (median) probability"]
    warnings = []
    for label, each in kinds.items():
        if each.teacher:
            ours, theirs = each.student, each.teacher
            lines.append(
                f"    {label}: teacher {fmean(theirs):.2g} ({median(theirs):.2g}), student {fmean(ours):.2g} "
                f"({median(ours):.2g}), at {len(theirs):,} of {len(each.positions):,} tokens"
            )
        warnings += _disagreement(label, each, student, teacher)
    if teacher.prefill and not kinds[CLOSING].positions:
        warnings.append(f"warning: no rollout contains {END_THINK}: the student does not end its reasoning")
    return lines + warnings


def _disagreement(label: str, kind: Kind, student: Chat, teacher: Chat) -> list[str]:
    """A warning where the teacher does not expect what the student writes."""
    if not kind.positions:
        return []
    token = label
    if label == END:
        token = f"the end token {tokens_text(student, student.stop_token_ids[-1:])}"
    if not kind.teacher:
        if label not in (END, CLOSING):
            return []
        return [f"warning: the teacher's probability of {token} is not known at any of {len(kind.positions):,} places"]
    theirs, ours = median(kind.teacher), median(kind.student)
    if label in (END, CLOSING) and theirs < NEGLIGIBLE:
        ends = f" (the teacher's end tokens: {tokens_text(teacher, teacher.stop_token_ids)})" if label == END else ""
        return [
            f"warning: where the student writes {token}, the teacher's median probability of it is {theirs:.2g}, "
            f"the student's {ours:.2g}, at {len(kind.teacher):,} places: templates or end tokens do not fit{ends}; "
            f"check train.chat_template and teacher_template"
        ]
    if fmean(kind.teacher) < DISAGREES * fmean(kind.student):
        return [
            f"warning: the teacher expects other text than the student's ({label}): mean probability "
            f"{fmean(kind.teacher):.2g} of the student's tokens, the student's {fmean(kind.student):.2g}, at "
            f"{len(kind.teacher):,} tokens; a cold start by `sft` brings them together (train.phases)"
        ]
    return []


def spans(trace: Trace, pieces: Sequence[bytes], student: Chat) -> list[str | None]:
    """The kind of each completion token; None for the rest of a `</think>` of several tokens. pieces: bytes of each id.

    A rollout whose reasoning never closes is reasoning to its end, if a block is open, else an answer.
    """
    ids = list(trace.completion_token_ids)
    ended = bool(ids) and not is_truncated(trace) and ids[-1] in student.stop_token_ids
    parts = [pieces[id_] if id_ < len(pieces) else b"" for id_ in (ids[:-1] if ended else ids)]
    text = b"".join(parts)  # an id beyond the tokenizer's has no text
    opened = trace.text.lstrip().startswith(THINK)
    start = text.find(END_THINK.encode())
    stop = start + len(END_THINK) if start >= 0 else -1
    kinds: list[str | None] = []
    offset = 0
    for part in parts:
        begin, offset = offset, offset + len(part)
        if start < 0:
            kinds.append(REASONING if opened else ANSWER)
        elif offset <= start:
            kinds.append(REASONING)
        elif begin >= stop:
            kinds.append(ANSWER)
        else:
            kinds.append(None if CLOSING in kinds else CLOSING)
    return [*kinds, END] if ended else kinds


def _masses(trace: Trace, distribution: Distribution) -> list[Masses]:
    """The probabilities at each completion token. A token that the teacher's list lacks gets at most its least one."""
    assert trace.logprobs is not None, "rollouts have the log-probabilities of their tokens"
    ids_sk, logprobs_sk = distribution
    masses = []
    for id_, logprob, ids_k, logprobs_k in zip(
        trace.completion_token_ids, trace.logprobs, ids_sk, logprobs_sk, strict=True
    ):
        listed = logprobs_k > -np.inf
        mass = None
        if listed.any():
            probabilities = np.exp(logprobs_k[listed].astype(np.float64))
            same = ids_k[listed] == id_
            rest = min(float(probabilities.min()), max(0.0, 1 - float(probabilities.sum())))
            mass = float(probabilities[same].sum()) if same.any() else rest
        masses.append(Masses(float(np.exp(logprob)), mass))
    return masses


def tokens_text(chat: Chat, ids: Iterable[int]) -> str:
    """Token ids as their tokenizer names them, for messages."""
    return ", ".join(str(chat.tokenizer.convert_ids_to_tokens(int(id_))) for id_ in ids)
