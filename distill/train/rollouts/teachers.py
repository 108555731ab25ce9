"""What the teacher says at each token of a rollout, in the student's vocabulary.

The teacher reads the rollout as its own completion: its template around the same messages, its tokens of the same text.
It is asked for its most likely tokens at each position and for those that the student found most likely, because a
divergence compares both (`objectives.on_policy`). With one tokenizer these are the same ids. With two they meet at byte
offsets (`rows.align`): a position at which only the student's token begins has no distribution, and a student's
candidate that is no single token of the teacher's belongs to the tail.

A server returns its own most likely tokens and the text's (`prompt_logprobs`), and cannot be asked for others: what the
student finds likely and the teacher does not is in the tail then, and the objective says at which positions it falls
back to the sampled token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.backends.backend import Backend
from distill.backends.scoring import completion_ids
from distill.chat import Chat
from distill.traces.trace import Trace
from distill.train.rows.align import Projector, Vocabulary, opened, token_bytes

Distribution = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class Taught(NamedTuple):
    """A rollout as the teacher scored it (its ids of prompt and completion), and the teacher's distribution at each of
    the student's tokens: ids and log-probabilities [s, k], −∞ after the last one known."""

    scored: Trace
    distribution: Distribution


class Teacher:
    """A teacher that scores rollouts. chat: its own. k: its own most likely tokens at each position. asks: whether it
    is also asked for those of the student (`estimator: exact`)."""

    def __init__(self, backend: Backend, chat: Chat, student: Chat, k: int, asks: bool) -> None:
        self.backend, self.chat, self.k, self.asks = backend, chat, k, asks
        theirs = Vocabulary(token_bytes(self.chat.tokenizer, self.chat.where), frozenset(self.chat.stop_token_ids))
        ours = Vocabulary(token_bytes(student.tokenizer, student.where), frozenset(student.stop_token_ids))
        self.student, self.end = student, student.stop_token_ids[-1]
        self.projector = Projector(
            theirs, ours, self.end, lambda text: student.tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        self._ids_of = {piece: id_ for id_, piece in reversed(list(enumerate(theirs.pieces))) if piece}

    def score(self, rollouts: Sequence[Trace]) -> list[Taught]:
        """The rollouts, scored, in order. Errors: UserError and WorkError, as `Backend.score`."""
        asked = [self._read(trace) for trace in rollouts]
        wanted = [self._wanted(trace, theirs) for trace, theirs in zip(rollouts, asked, strict=True)]
        scored = self.backend.score(asked, self.k, wanted if self.asks else None)
        return [Taught(s, self._distribution(trace, s)) for trace, s in zip(rollouts, scored, strict=True)]

    def _read(self, trace: Trace) -> Trace:
        """The rollout with the teacher's token ids. A rollout that was cut off does not end."""
        ids = completion_ids(trace, self.chat)
        if trace.completion_token_ids and trace.completion_token_ids[-1] not in self.student.stop_token_ids:
            while ids and ids[-1] in self.chat.stop_token_ids:
                ids = ids[:-1]
        return replace(trace, completion_token_ids=tuple(ids))

    def _pieces(self, trace: Trace) -> list[bytes]:
        """The bytes of the student's tokens; those that end a turn have none."""
        stops, student = self.student.stop_token_ids, self.projector.student
        return [b"" if id_ in stops else student.piece(id_) for id_ in trace.completion_token_ids]

    def _wanted(self, trace: Trace, theirs: Trace) -> list[list[int]]:
        """The teacher's ids of the student's most likely tokens, at each of the teacher's tokens."""
        assert trace.top_logprobs is not None, "rollouts come with the student's most likely tokens"
        given, skipped = self._opened(trace)
        tops: dict[int, list[int]] = {}
        offset = 0
        for piece, top in zip(self._pieces(trace), trace.top_logprobs, strict=True):
            tops[offset] = [id_ for id_, _ in top]
            offset += len(piece)
        wanted, offset = [], len(given) - len(skipped)
        for id_ in theirs.completion_token_ids:
            ids = (self._theirs(candidate) for candidate in tops.get(offset, ()))
            wanted.append([candidate for candidate in ids if candidate is not None])
            offset += 0 if id_ in self.chat.stop_token_ids else len(self.projector.teacher.piece(id_))
        return wanted

    def _theirs(self, candidate: int) -> int | None:
        """The teacher's token with the bytes of a student's."""
        if candidate in self.student.stop_token_ids:
            return self.chat.stop_token_ids[-1]
        piece = self.projector.student.piece(candidate)
        pieces = self.projector.teacher.pieces
        return (
            candidate if candidate < len(pieces) and pieces[candidate] == piece and piece else self._ids_of.get(piece)
        )

    def _opened(self, trace: Trace) -> tuple[bytes, bytes]:
        return opened(trace.text, self.chat.prefill, self.student.prefill)

    def _distribution(self, trace: Trace, scored: Trace) -> Distribution:
        """The teacher's distribution at each token of the rollout."""
        assert scored.logprobs is not None and scored.top_logprobs is not None
        supervised = trace.completion_token_ids
        given, skipped = self._opened(trace)
        tops = [  # the rollout's own token is among those known, likely or not
            top if any(id_ == chosen for id_, _ in top) else (*top, (chosen, logprob))
            for top, chosen, logprob in zip(
                scored.top_logprobs, scored.completion_token_ids, scored.logprobs, strict=True
            )
        ]
        projected = self.projector.project(
            given, scored.completion_token_ids, scored.logprobs, tops, supervised, skipped
        )
        width = max(1, max((len(masses) for masses in projected if masses), default=1))
        ids = np.zeros((len(supervised), width), np.int32)
        logprobs = np.full((len(supervised), width), -np.inf, np.float32)
        for place, masses in enumerate(projected):
            if masses:
                likeliest = sorted(masses.items(), key=lambda item: -item[1])
                ids[place, : len(likeliest)] = [id_ for id_, _ in likeliest]
                logprobs[place, : len(likeliest)] = [logprob for _, logprob in likeliest]
        return ids, logprobs
