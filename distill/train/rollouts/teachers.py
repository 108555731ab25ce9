"""What the teacher says at each token of a rollout, in the student's vocabulary.

The teacher reads the rollout as its own completion: its template around the same messages, its tokens of the same text.
It is asked for its most likely tokens at each position and for those that the student found most likely, because a
divergence compares both (`objectives.on_policy`). With one tokenizer these are the same ids, and each model may have
rows for more of them than the other (Qwen2.5-7B has 152,064, the smaller ones 151,936): ids of the teacher past the
student's last belong to the tail, and the teacher is not asked for ids past its own. With two tokenizers they meet at
byte offsets (`rows.align`): a position at which only the student's token begins has no distribution, and a student's
candidate that is no single token of the teacher's belongs to the tail.

A server returns its own most likely tokens and the text's (`prompt_logprobs`), and cannot be asked for others: what the
student finds likely and the teacher does not is in the tail then, and the objective says at which positions it falls
back to the sampled token.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.backends.backend import Backend, Scored
from distill.backends.scoring import completion_ids
from distill.chat import Chat
from distill.traces.trace import Trace
from distill.train.rollouts.student import Rollout
from distill.train.rows.align import Projector, Vocabulary, opened, token_bytes

Distribution = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class Taught(NamedTuple):
    """A rollout as the teacher scored it (its ids of prompt and completion), and the teacher's distribution at each of
    the student's tokens: ids and log-probabilities [s, k], −∞ after the last one known."""

    scored: Trace
    distribution: Distribution


class Teacher:
    """A teacher that scores rollouts. chat: its own. vocab_size: of the student's logits. k: its own most likely tokens
    at each position. asks: whether it is also asked for those of the student (`estimator: exact`)."""

    def __init__(self, backend: Backend, chat: Chat, student: Chat, vocab_size: int, k: int, asks: bool) -> None:
        self.backend, self.chat, self.vocab_size, self.k, self.asks = backend, chat, vocab_size, k, asks
        theirs = Vocabulary(token_bytes(self.chat.tokenizer, self.chat.where), frozenset(self.chat.stop_token_ids))
        ours = Vocabulary(token_bytes(student.tokenizer, student.where), frozenset(student.stop_token_ids))
        self.same_tokens = theirs == ours
        self.student, self.end = student, student.stop_token_ids[-1]
        self.projector = Projector(
            theirs, ours, self.end, lambda text: student.tokenizer(text, add_special_tokens=False)["input_ids"]
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[Taught]:
        """The rollouts, scored, in order. Errors: UserError and WorkError, as `Backend.score`."""
        traces = [each.trace for each in rollouts]
        read = [self._read(trace) for trace in traces]
        # A rollout that was cut off inside what the teacher's template opens has no token of the teacher's.
        asked = [i for i, theirs in enumerate(read) if theirs.completion_token_ids]
        wanted = [self._wanted(rollouts[i], read[i]) for i in asked] if self.asks else None
        scored = self.backend.scored([read[i] for i in asked], self.k, wanted) if asked else []
        taught = {i: self._taught(traces[i], read[i], each) for i, each in zip(asked, scored, strict=True)}
        return [taught.get(i) or self._unknown(trace, read[i]) for i, trace in enumerate(traces)]

    def _read(self, trace: Trace) -> Trace:
        """The rollout with the teacher's token ids. One that was cut off does not end, and has the text that these ids
        say, which a tokenizer may have normalised: with another text they would not be taken as its own again."""
        ids, text = completion_ids(trace, self.chat, self.backend.vocab_size), trace.text
        if trace.completion_token_ids and trace.completion_token_ids[-1] not in self.student.stop_token_ids:
            while ids and ids[-1] in self.chat.stop_token_ids:
                ids = ids[:-1]
            text = (self.chat.prefill if text.startswith(self.chat.prefill) else "") + self.chat.decode(ids)
        return replace(trace, text=text, completion_token_ids=tuple(ids))

    def _wanted(self, rollout: Rollout, theirs: Trace) -> npt.NDArray[np.int32]:
        """The teacher's ids of the student's most likely tokens at each of the teacher's: [t, k], −1 for none."""
        trace, likeliest_sk = rollout
        size = self.backend.vocab_size
        assert likeliest_sk is not None, "rollouts come with the student's most likely tokens"
        assert size is not None, "a teacher that is asked for ids has its weights here"
        if self._alike(trace, theirs.completion_token_ids):
            return np.where(likeliest_sk < size, likeliest_sk, -1).astype(np.int32)
        given, skipped = self._opened(trace)
        student, teacher = self.projector.student, self.projector.teacher
        start_s = starts(trace.completion_token_ids, student, 0)
        start_t = starts(theirs.completion_token_ids, teacher, len(given) - len(skipped))
        at_t = np.searchsorted(start_s, start_t, side="right") - 1  # the last of the student's that begins by then
        begins_t = (at_t >= 0) & (start_s[at_t] == start_t)
        known_sk = np.minimum(likeliest_sk, len(student.pieces))  # beyond: ids of a padded embedding
        wanted_tk = self._same[known_sk[at_t]]
        return np.where(begins_t[:, None] & (wanted_tk < size), wanted_tk, -1).astype(np.int32)

    @cached_property
    def _same(self) -> npt.NDArray[np.int32]:
        """The teacher's token with the bytes of each of the student's, the same id if several have these; −1 for none,
        and in one place more at the end."""
        ours, theirs = self.projector.student, self.projector.teacher.pieces
        by_piece = {piece: id_ for id_, piece in reversed(list(enumerate(theirs))) if piece}
        same = [
            id_ if id_ < len(theirs) and theirs[id_] == piece and piece else by_piece.get(piece, -1)
            for id_, piece in enumerate(ours.pieces)
        ]
        same_v = np.array([*same, -1], np.int32)
        same_v[[id_ for id_ in ours.stops if id_ < len(same)]] = self.chat.stop_token_ids[-1]
        return same_v

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
        return Taught(read, within(distribution, self.vocab_size))

    def _unknown(self, trace: Trace, read: Trace) -> Taught:
        """A rollout of which the teacher reads no token."""
        shape = len(trace.completion_token_ids), 1
        read = replace(read, prompt_token_ids=tuple(self.chat.prompt_ids_of(trace.prompt.messages, trace.text)))
        return Taught(read, (np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)))


def starts(ids: Sequence[int], vocabulary: Vocabulary, offset: int) -> npt.NDArray[np.int64]:
    """The offset in bytes at which each token begins, the first at `offset`. The ends of turns have no text."""
    length_t = np.array([0 if id_ in vocabulary.stops else len(vocabulary.piece(id_)) for id_ in ids], np.int64)
    return offset + np.cumsum(length_t) - length_t


def within(distribution: Distribution, vocab_size: int) -> Distribution:
    """A distribution without the ids from `vocab_size` on, whose mass is the tail's then."""
    ids_sk, logprobs_sk = distribution
    outside_sk = ids_sk >= vocab_size
    if not outside_sk.any():
        return distribution
    order_sk = np.argsort(outside_sk, axis=1, kind="stable")  # −∞ only after the last one known
    ids_sk, logprobs_sk = np.where(outside_sk, 0, ids_sk), np.where(outside_sk, np.float32(-np.inf), logprobs_sk)
    return np.take_along_axis(ids_sk, order_sk, 1), np.take_along_axis(logprobs_sk, order_sk, 1)


def with_own(scored: Scored) -> Distribution:
    """The alternatives of a scored trace with its own tokens among them, likely or not, those in a last column."""
    ids_tk, logprobs_tk = scored.top_id_tk, scored.top_logprob_tk
    own_t = np.array(scored.completion_ids, np.int32)
    listed_t = ((ids_tk == own_t[:, None]) & (logprobs_tk > -np.inf)).any(1)
    width = max(1, int((logprobs_tk > -np.inf).sum(1).max(initial=0)))
    ids_tk, logprobs_tk = ids_tk[:, :width], logprobs_tk[:, :width]
    if listed_t.all():
        return ids_tk, logprobs_tk
    own_logprob_t = np.where(listed_t, -np.inf, scored.logprob_t).astype(np.float32)
    return np.column_stack((ids_tk, np.where(listed_t, 0, own_t))), np.column_stack((logprobs_tk, own_logprob_t))
