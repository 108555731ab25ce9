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
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.backends.backend import Backend, Scored
from distill.backends.scoring import completion_ids
from distill.chat import Chat
from distill.traces.trace import Trace
from distill.train.rows.align import Projector, Vocabulary, merged, opened, token_bytes

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
        self.same_tokens = theirs == ours
        self.student, self.end = student, student.stop_token_ids[-1]
        self.projector = Projector(
            theirs, ours, self.end, lambda text: student.tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        self._same: dict[int, int | None] = {}  # the student's token → the teacher's
        self._ids_of = {piece: id_ for id_, piece in reversed(list(enumerate(theirs.pieces))) if piece}

    def score(self, rollouts: Sequence[Trace]) -> list[Taught]:
        """The rollouts, scored, in order. Errors: UserError and WorkError, as `Backend.score`."""
        read = [self._read(trace) for trace in rollouts]
        # A rollout that was cut off inside what the teacher's template opens has no token of the teacher's.
        asked = [i for i, theirs in enumerate(read) if theirs.completion_token_ids]
        wanted = [self._wanted(rollouts[i], read[i]) for i in asked] if self.asks else None
        scored = self.backend.scored([read[i] for i in asked], self.k, wanted) if asked else []
        taught = {i: self._taught(rollouts[i], read[i], each) for i, each in zip(asked, scored, strict=True)}
        return [taught.get(i) or self._unknown(trace, read[i]) for i, trace in enumerate(rollouts)]

    def _read(self, trace: Trace) -> Trace:
        """The rollout with the teacher's token ids. A rollout that was cut off does not end."""
        ids = completion_ids(trace, self.chat)
        if trace.completion_token_ids and trace.completion_token_ids[-1] not in self.student.stop_token_ids:
            while ids and ids[-1] in self.chat.stop_token_ids:
                ids = ids[:-1]
        return replace(trace, completion_token_ids=tuple(ids))

    def _wanted(self, trace: Trace, theirs: Trace) -> list[list[int]]:
        """The teacher's ids of the student's most likely tokens, at each of the teacher's tokens."""
        assert trace.top_logprobs is not None, "rollouts come with the student's most likely tokens"
        if self._alike(trace, theirs.completion_token_ids):
            return [[id_ for id_, _ in top] for top in trace.top_logprobs]
        given, skipped = self._opened(trace)
        stops, student = self.student.stop_token_ids, self.projector.student
        lengths = [0 if id_ in stops else len(student.piece(id_)) for id_ in trace.completion_token_ids]
        starts = dict(zip(accumulate([0, *lengths[:-1]]), trace.top_logprobs, strict=True))
        wanted, offset = [], len(given) - len(skipped)
        for id_ in theirs.completion_token_ids:
            ids = [self._theirs(candidate) for candidate, _ in starts.get(offset, ())]
            wanted.append([candidate for candidate in ids if candidate is not None])
            offset += 0 if id_ in self.chat.stop_token_ids else len(self.projector.teacher.piece(id_))
        return wanted

    def _theirs(self, candidate: int) -> int | None:
        """The teacher's token with the bytes of a student's."""
        if candidate not in self._same:
            self._same[candidate] = self._same_as(candidate)
        return self._same[candidate]

    def _same_as(self, candidate: int) -> int | None:
        if candidate in self.student.stop_token_ids:
            return self.chat.stop_token_ids[-1]
        piece, pieces = self.projector.student.piece(candidate), self.projector.teacher.pieces
        same = candidate < len(pieces) and pieces[candidate] == piece and piece != b""
        return candidate if same else self._ids_of.get(piece)

    def _alike(self, trace: Trace, theirs: Sequence[int]) -> bool:
        """Whether teacher and student read the same tokens, which mean the same to both."""
        return self.same_tokens and trace.completion_token_ids == tuple(theirs)

    def _opened(self, trace: Trace) -> tuple[bytes, bytes]:
        return opened(trace.text, self.chat.prefill, self.student.prefill)

    def _taught(self, trace: Trace, asked: Trace, scored: Scored) -> Taught:
        """The teacher's distribution at each token of the rollout."""
        given, skipped = self._opened(trace)
        if self._alike(trace, scored.completion_ids):
            distribution = with_own(scored)
        else:
            distribution = self.projector.arrays(
                given,
                scored.completion_ids,
                scored.logprob_t,
                scored.top_id_tk,
                scored.top_logprob_tk,
                trace.completion_token_ids,
                skipped,
            )
        read = replace(asked, prompt_token_ids=scored.prompt_ids, completion_token_ids=scored.completion_ids)
        return Taught(read, distribution)

    def _unknown(self, trace: Trace, read: Trace) -> Taught:
        """A rollout of which the teacher reads no token."""
        shape = len(trace.completion_token_ids), 1
        read = replace(read, prompt_token_ids=tuple(self.chat.prompt_ids_of(trace.prompt.messages, trace.text)))
        return Taught(read, (np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)))


def with_own(scored: Scored) -> Distribution:
    """The alternatives of a scored trace with its own tokens among them, likely or not."""
    own_t = np.array(scored.completion_ids, np.int32)[:, None]
    listed_t = ((scored.top_id_tk == own_t) & (scored.top_logprob_tk > -np.inf)).any(1, keepdims=True)
    own_logprob_t = np.where(listed_t, -np.inf, scored.logprob_t[:, None]).astype(np.float32)
    return merged(np.hstack((scored.top_id_tk, own_t)), np.hstack((scored.top_logprob_tk, own_logprob_t)))
