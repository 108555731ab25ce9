"""A teacher's next-token distributions, mapped to the student's vocabulary.

R1's students have another tokenizer than R1, so that "the next token" is a different event for each; comparing the two
by token id is silently wrong. What both share is text: byte strings. At a position where a token of each begins, the
teacher's most likely tokens are candidates for the text that follows, and each implies a next token of the student: the
first one of the student's own tokenisation of that candidate. Their probabilities, summed by that token, are the
teacher's distribution over the student's next token, as far as it is known; the remaining mass is the tail's.

One case needs care: the teacher took smaller steps than the student ("hel", "lo" where the student has "hello"). There
the probability of the student's token is that of the whole chain, if the chain ends with the token; "hel" alone implies
no token of the student, as it may continue differently, and its mass goes to the tail.

With one tokenizer every token begins where the other's does, every candidate is a token of the student, and the mapping
is the identity. Three kinds of positions have no distribution: those where only the student's token begins (inside a
token of the teacher), tokens that the teacher was given and did not choose (a prefilled `<think>`), and everything
after a difference between the texts (a tokenizer that normalises). There only the trace's own token is known.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from distill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TopLogprobs = Sequence[tuple[int, float]]
Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
Masses = dict[int, float]  # student's token → log-probability


def token_bytes(tokenizer: "PreTrainedTokenizerBase", where: str) -> list[bytes]:
    """The bytes of each token id. Errors: UserError for a tokenizer that is not byte-level."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    if not any(part.get("type") == "ByteLevel" for part in parts):
        raise UserError(
            f"the tokenizer of {where} is not byte-level (its decoder is {decoder.get('type')}): the objectives with a "
            f"teacher compare its tokens with the student's by their bytes; set train.objective.kind to `sft` or `grpo`"
        )
    alphabet = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
    known = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    pieces = []
    for id_ in range(max(known) + 1):
        if id_ in added:
            pieces.append(added[id_].encode())
        else:
            pieces.append(bytes(alphabet[symbol] for symbol in known.get(id_, "")))
    return pieces


def byte_symbols() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes as: printable bytes as themselves, the others as the
    characters from 256 on (Radford et al. 2019, GPT-2's encoder)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols, following = [], 256
    for byte in range(256):
        symbols.append(chr(byte) if byte in printable else chr(following))
        following += byte not in printable
    return symbols


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens. pieces: the bytes of each id. stops: the ids that end a turn."""

    pieces: list[bytes]
    stops: frozenset[int]

    def piece(self, id_: int) -> bytes:
        """The bytes of an id; none for the ids of a padded embedding, which a model can sample too."""
        return self.pieces[id_] if id_ < len(self.pieces) else b""


class Projector:
    """Maps one teacher's tokens to one student's.

    encode: the student's tokenisation of a text. end: the student's token that ends a turn.
    """

    def __init__(
        self, teacher: Vocabulary, student: Vocabulary, end: int, encode: Callable[[str], Sequence[int]]
    ) -> None:
        self.teacher, self.student, self.end = teacher, student, end
        self._encode = encode
        self._first: dict[int, int | None] = {}  # the teacher's token → the student's
        self._whole = {piece: id_ for id_, piece in reversed(list(enumerate(student.pieces))) if piece}

    def first(self, candidate: int) -> int | None:
        """The student's first token of a teacher's token; None if there is none (for half a character, say)."""
        if candidate not in self._first:
            self._first[candidate] = self._first_of(candidate)
        return self._first[candidate]

    def _first_of(self, candidate: int) -> int | None:
        if candidate in self.teacher.stops:
            return self.end
        piece = self.teacher.piece(candidate)
        if candidate < len(self.student.pieces) and self.student.pieces[candidate] == piece and piece:
            return candidate  # the same id, if several tokens have these bytes
        if piece in self._whole:
            return self._whole[piece]
        try:
            ids = self._encode(piece.decode())
        except UnicodeDecodeError:
            return None
        return ids[0] if len(ids) and piece.startswith(self.student.pieces[ids[0]] or b"\0") else None

    def project(
        self,
        prefill: bytes,
        completion: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[TopLogprobs],
        supervised: Sequence[int],
        skipped: bytes = b"",
    ) -> list[Masses | None]:
        """The teacher's distribution at each supervised token of the student; None where it is unknown.

        prefill: the beginning of the student's text that was part of the teacher's prompt. completion, logprobs, tops:
        the teacher's tokens, their log-probabilities, and its most likely tokens at each. supervised: the student's
        tokens, with the one that ends the turn. skipped: the beginning of the teacher's text that was part of the
        student's prompt (`opened` returns both).
        """
        theirs = [b"" if id_ in self.teacher.stops else self.teacher.piece(id_) for id_ in completion]
        ours = [b"" if id_ == self.end else self.student.piece(id_) for id_ in supervised]
        their_text, our_text = (prefill + b"".join(theirs))[len(skipped) :], b"".join(ours)
        same = len(their_text) if their_text == our_text else common(their_text, our_text)
        starts: dict[int, int] = {}  # offset in the text → the teacher's token that begins there
        offset = len(prefill) - len(skipped)
        for i, piece in enumerate(theirs):
            starts[offset] = i
            offset += len(piece)
        distributions: list[Masses | None] = []
        offset = 0
        for id_, piece in zip(supervised, ours, strict=True):
            i = starts.get(offset, -1)
            whole = offset + len(piece) <= same and (piece or their_text == our_text)
            shared = i >= 0 and whole
            distributions.append(self._at(i, id_, piece, theirs, completion, logprobs, tops) if shared else None)
            offset += len(piece)
        return distributions

    def arrays(
        self,
        prefill: bytes,
        completion: Sequence[int],
        logprob_t: Logprobs,
        top_id_tk: Ids,
        top_logprob_tk: Logprobs,
        supervised: Sequence[int],
        skipped: bytes = b"",
    ) -> tuple[Ids, Logprobs]:
        """What `project` returns, from arrays and as arrays: ids and log-probabilities [s, k], likeliest first, −∞ past
        the last one known. The teacher's own token at each position is among its candidates, likely or not."""
        own_t = np.array(completion, np.int32)
        listed_t = ((top_id_tk == own_t[:, None]) & (top_logprob_tk > -np.inf)).any(1)
        top_id_tk = np.concatenate((top_id_tk, own_t[:, None]), 1)
        own_logprob_t = np.where(listed_t, -np.inf, logprob_t).astype(np.float32)
        top_logprob_tk = np.concatenate((top_logprob_tk, own_logprob_t[:, None]), 1)
        theirs = [b"" if id_ in self.teacher.stops else self.teacher.piece(id_) for id_ in completion]
        ours = [b"" if id_ == self.end else self.student.piece(id_) for id_ in supervised]
        their_text, our_text = (prefill + b"".join(theirs))[len(skipped) :], b"".join(ours)
        same = len(their_text) if their_text == our_text else common(their_text, our_text)
        their_length_t, our_length_s = (np.array([*map(len, pieces)], np.int64) for pieces in (theirs, ours))
        their_start_t = len(prefill) - len(skipped) + np.cumsum(their_length_t) - their_length_t
        our_end_s = np.cumsum(our_length_s)
        our_start_s = our_end_s - our_length_s
        at_s = (
            np.searchsorted(their_start_t, our_start_s, side="right") - 1
        )  # the last token that begins there or before
        begins_s = (at_s >= 0) & (their_start_t[at_s] == our_start_s) if len(own_t) else np.zeros(len(ours), bool)
        whole_s = (our_end_s <= same) & ((our_length_s > 0) | (their_text == our_text))
        shared_s = begins_s & whole_s
        id_sk = np.zeros((len(ours), top_id_tk.shape[1]), np.int32)
        logprob_sk = np.full(id_sk.shape, -np.inf, np.float32)
        direct = np.flatnonzero(shared_s & (their_length_t[at_s] >= our_length_s)) if len(own_t) else np.arange(0)
        id_sk[direct] = self._firsts(top_id_tk[at_s[direct]])
        logprob_sk[direct] = np.where(id_sk[direct] < 0, -np.inf, top_logprob_tk[at_s[direct]])
        smaller = np.flatnonzero(shared_s & (their_length_t[at_s] < our_length_s)) if len(own_t) else np.arange(0)
        logprobs = logprob_t.tolist()
        for s, i in zip(smaller.tolist(), at_s[smaller].tolist(), strict=True):
            tops = {i: pairs(top_id_tk[i], top_logprob_tk[i])}
            masses = self._at(i, supervised[s], ours[s], theirs, completion, logprobs, tops) or {}
            id_sk[s, : len(masses)], logprob_sk[s, : len(masses)] = list(masses), list(masses.values())
        return merged(id_sk, logprob_sk)

    def _firsts(self, candidates: Ids) -> Ids:
        """`first` of an array; −1 for none."""
        unique, places = np.unique(candidates, return_inverse=True)
        firsts = [-1 if (first := self.first(candidate)) is None else first for candidate in unique.tolist()]
        return np.array(firsts, np.int32)[places].reshape(candidates.shape)

    def _at(
        self,
        i: int,
        id_: int,
        piece: bytes,
        theirs: Sequence[bytes],
        completion: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[TopLogprobs] | Mapping[int, TopLogprobs],
    ) -> Masses | None:
        smaller = len(theirs[i]) < len(piece)
        masses: Masses = {}
        for candidate, logprob in tops[i]:
            if smaller and candidate == completion[i]:
                continue
            if (first := self.first(candidate)) is not None:
                masses[first] = logaddexp(masses.get(first, -math.inf), logprob)
        if smaller:
            chain, length = 0.0, 0
            while length < len(piece):
                chain, length, i = chain + logprobs[i], length + len(theirs[i]), i + 1
            if length > len(piece):
                return None  # the chain extends beyond the student's token
            masses[id_] = logaddexp(masses.get(id_, -math.inf), chain)
        return masses or None


def opened(text: str, teacher: str, student: str) -> tuple[bytes, bytes]:
    """What only the teacher's prompt contains of an answer's beginning, and what only the student's does, in bytes.

    text: the whole answer. teacher, student: the prefills of their templates, which count where the answer has them.
    """
    theirs, ours = (prefill if text.startswith(prefill) else "" for prefill in (teacher, student))
    return theirs[len(ours) :].encode(), ours[len(theirs) :].encode()


def merged(id_sk: Ids, logprob_sk: Logprobs) -> tuple[Ids, Logprobs]:
    """Add up the masses of equal ids in each row, and sort each by mass. Entries of −∞ do not exist; the width is that
    of the longest row, at least 1."""
    if not len(id_sk):
        return id_sk, logprob_sk
    id_sk = np.where(logprob_sk > -np.inf, id_sk, -1)
    order_sk = np.argsort(id_sk, axis=1, kind="stable")
    id_sk, logprob_sk = np.take_along_axis(id_sk, order_sk, 1), np.take_along_axis(logprob_sk, order_sk, 1)
    begins_sk = np.ones_like(id_sk, bool)
    begins_sk[:, 1:] = id_sk[:, 1:] != id_sk[:, :-1]
    starts = np.flatnonzero(begins_sk)
    mass = np.logaddexp.reduceat(logprob_sk.ravel().astype(np.float64), starts).astype(np.float32)
    total_sk = np.full(id_sk.shape, -np.inf, np.float32)
    total_sk[begins_sk] = mass
    total_sk[id_sk < 0] = -np.inf
    order_sk = np.argsort(-total_sk, axis=1, kind="stable")
    id_sk, total_sk = np.take_along_axis(id_sk, order_sk, 1), np.take_along_axis(total_sk, order_sk, 1)
    most = max(1, int((total_sk > -np.inf).sum(1).max()))
    return np.where(total_sk > -np.inf, id_sk, 0)[:, :most].astype(np.int32), total_sk[:, :most]


def pairs(id_k: Ids, logprob_k: Logprobs) -> TopLogprobs:
    """The entries above −∞ as (id, log-probability)."""
    return [pair for pair in zip(id_k.tolist(), logprob_k.tolist(), strict=True) if pair[1] > -math.inf]


def logaddexp(a: float, b: float) -> float:
    """ln(eᵃ + eᵇ), also for −∞."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def common(a: bytes, b: bytes) -> int:
    """Length of the common prefix, in bytes."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
