"""A teacher's next-token distributions, said in the student's tokens.

R1's students have another tokenizer than R1, so that "the next token" is another event for each of them; comparing the
two by token number is wrong, silently. What both share is text: byte strings. At a place where a token of each begins,
the teacher's likeliest tokens are candidates for the text that follows, and each is a statement about the student's
next token: the first one of the student's own tokenisation of that candidate. Their probabilities, summed by that
token, are the teacher's distribution over the student's next token, as far as it is known; the rest is the tail's.

One case needs care: the teacher went on in smaller steps than the student ("hel", "lo" where the student has "hello").
There the probability of the student's token is that of the whole chain, where the chain ends with the token; "hel"
itself says nothing, as it may have gone on otherwise, and its mass is the tail's.

With one tokenizer every token begins where the other's does, every candidate is a token of the student, and all of this
is the identity. Places where only the student's token begins (inside a token of the teacher's) have no distribution;
nor have tokens that the teacher was given and did not choose (a prefilled `<think>`), nor what follows a difference
between the texts (a tokenizer that normalises). There the trace's own token is what is known of the teacher.
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
    """The bytes that each token id stands for. Errors: UserError for a tokenizer that is not byte-level."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    if not any(part.get("type") == "ByteLevel" for part in parts):
        raise UserError(
            f"the tokenizer of {where} is not byte-level (its decoder is {decoder.get('type')}): the `logits` "
            f"objective compares teachers and students by the bytes of their tokens; set train.objective to `sft`"
        )
    alphabet = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
    known = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    found = []
    for id_ in range(max(known) + 1):
        if id_ in added:
            found.append(added[id_].encode())
        else:
            found.append(bytes(alphabet[symbol] for symbol in known.get(id_, "")))
    return found


def byte_symbols() -> list[str]:
    """The 256 characters by which byte-level tokenizers write bytes: printable ones stand for themselves, the others
    are numbered from 256 on (Radford et al. 2019, GPT-2's encoder)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols, following = [], 256
    for byte in range(256):
        symbols.append(chr(byte) if byte in printable else chr(following))
        following += byte not in printable
    return symbols


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer. stops: the ids that end a turn."""

    pieces: list[bytes]
    stops: frozenset[int]


class Projector:
    """From one teacher's tokens to one student's. encode: the student's tokenisation of a text.

    end: the student's token that ends a turn.
    """

    def __init__(
        self, teacher: Vocabulary, student: Vocabulary, end: int, encode: Callable[[str], Sequence[int]]
    ) -> None:
        self.teacher, self.student, self.end = teacher, student, end
        self._encode = encode
        self._first: dict[int, int | None] = {}
        self._whole = {piece: id_ for id_, piece in reversed(list(enumerate(student.pieces))) if piece}

    def first(self, candidate: int) -> int | None:
        """The student's first token of a teacher's token; None where there is none (half a character, say)."""
        if candidate not in self._first:
            self._first[candidate] = self._find(candidate)
        return self._first[candidate]

    def _find(self, candidate: int) -> int | None:
        if candidate in self.teacher.stops:
            return self.end
        piece = self.teacher.pieces[candidate] if candidate < len(self.teacher.pieces) else b""
        if candidate < len(self.student.pieces) and self.student.pieces[candidate] == piece and piece:
            return candidate  # the same number for the same bytes, where several tokens have them
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
    ) -> list[Masses | None]:
        """The teacher's distribution at each supervised token of the student; None where nothing is known.

        prefill: what stood in the teacher's prompt of the text that the student is to write. completion, logprobs,
        tops: the teacher's tokens, their log-probabilities, and its likeliest tokens at each. supervised: the
        student's tokens, the ending one included.
        """
        theirs = [b"" if id_ in self.teacher.stops else self.teacher.pieces[id_] for id_ in completion]
        ours = [b"" if id_ == self.end else self.student.pieces[id_] for id_ in supervised]
        their_text, our_text = prefill + b"".join(theirs), b"".join(ours)
        same = len(their_text) if their_text == our_text else common(their_text, our_text)
        starts: dict[int, int] = {}  # place in the text → the teacher's token that begins there
        place = len(prefill)
        for i, piece in enumerate(theirs):
            starts[place] = i
            place += len(piece)
        found: list[Masses | None] = []
        place = 0
        for id_, piece in zip(supervised, ours, strict=True):
            i = starts.get(place, -1)
            whole = place + len(piece) <= same and (piece or their_text == our_text)
            shared = i >= 0 and whole
            found.append(self._at(i, id_, piece, theirs, completion, logprobs, tops) if shared else None)
            place += len(piece)
        return found

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
                return None  # the chain goes on beyond the student's token
            masses[id_] = logaddexp(masses.get(id_, -math.inf), chain)
        return masses or None


def logaddexp(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def common(a: bytes, b: bytes) -> int:
    """How many bytes two texts share from their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
