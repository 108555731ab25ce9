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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TopLogprobs = Sequence[tuple[int, float]]
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

    def _at(
        self,
        i: int,
        id_: int,
        piece: bytes,
        theirs: Sequence[bytes],
        completion: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[TopLogprobs],
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
