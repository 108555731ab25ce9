"""The choices of an answer: the tokens of the engine's samples as text, log-probabilities and finish reasons.

An answer that is streamed and one that is not are made of the same deltas; without streaming they are joined.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate

from distill.backends.live import Asked, LiveModel, Piece
from distill.backends.text import Decoder, ReasoningSplitter, Split, StopStrings
from distill.chat import Chat
from distill.serve.requests import Object

LEAST = -9999.0  # in place of minus infinity, which JSON does not have, as OpenAI's service has it


@dataclass
class Delta:
    """What a choice has more of. reasoning, content: text. finish_reason: None while more follows."""

    reasoning: str = ""
    content: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is text, or the end."""
        return bool(self.reasoning or self.content or self.finish_reason)

    def add(self, other: "Delta") -> None:
        """Append another delta of the same choice."""
        self.reasoning += other.reasoning
        self.content += other.content
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.top_logprobs += other.top_logprobs
        self.finish_reason = other.finish_reason or self.finish_reason


class _Choice:
    """One sample on its way from token ids to text. prefill: what the prompt has opened of the text. after: as of
    `Decoder`."""

    def __init__(self, chat: Chat, stop: Sequence[str], prefill: str, separate: bool, after: Sequence[int]) -> None:
        self._decoder, self._stops = Decoder(chat, after), StopStrings(stop)
        self._splitter = ReasoningSplitter() if separate else None
        self._prefill = prefill
        self.finished = False

    def feed(self, piece: Piece) -> Delta:
        """The delta of a piece, which ends the choice where a stop string is complete."""
        last = piece.finish_reason is not None
        text = self._stops.feed(self._decoder.feed(piece.token_ids, last), last)
        reason = "stop" if self._stops.stopped else piece.finish_reason
        self.finished = reason is not None
        text, self._prefill = self._prefill + text, ""
        parts = self._splitter.feed(text, self.finished) if self._splitter else Split(content=text)
        tops = list(piece.top_logprobs or ())
        return Delta(parts.reasoning, parts.content, list(piece.token_ids), list(piece.logprobs), tops, reason)


async def deltas(
    live: LiveModel,
    chat: Chat,
    asked: Asked,
    stop: Sequence[str],
    prefill: str,
    separate: bool,
    after: Sequence[int] = (),
) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index of a choice, delta) until every choice is finished. Errors: Rejected; Broken."""
    choices = {sample: _Choice(chat, stop, prefill, separate, after) for sample in asked.samples}
    left = len(choices)
    with live.ask(asked) as running:
        async with aclosing(running.pieces()) as pieces:
            async for piece in pieces:
                choice = choices[piece.sample]
                if choice.finished:  # by a stop string; its tokens still arrive for a moment
                    continue
                delta = choice.feed(piece)
                yield asked.samples.index(piece.sample), delta
                if delta.finish_reason is None:
                    continue
                left -= 1
                if not left:
                    return
                if piece.finish_reason is None:
                    running.drop(piece.sample)


class TokenTexts:
    """Log-probabilities as the two endpoints write them. Texts of tokens are made once."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._texts: dict[int, str] = {}

    def chat_logprobs(self, delta: Delta) -> Object:
        """`logprobs` of a choice of a chat completion; each token also has its `token_id`."""
        tops = delta.top_logprobs or [()] * len(delta.logprobs)
        rows = zip(delta.token_ids, delta.logprobs, tops, strict=True)
        content: list[Object] = [
            self._token(token, logprob) | {"top_logprobs": [dict(self._token(*each)) for each in top]}
            for token, logprob, top in rows
        ]
        return {"content": [dict(row) for row in content], "refusal": None}

    def completion_logprobs(self, delta: Delta, offset: int) -> Object:
        """`logprobs` of a choice of a text completion. offset: characters before the delta."""
        texts = [self._text(token) for token in delta.token_ids]
        offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
        tops = [{self._text(token): _number(logprob) for token, logprob in top} for top in delta.top_logprobs]
        ids = [{str(token): _number(logprob) for token, logprob in top} for top in delta.top_logprobs]
        return {
            "tokens": list(texts),
            "token_logprobs": [_number(logprob) for logprob in delta.logprobs],
            "top_logprobs": [dict(top) for top in tops] or None,
            "top_logprobs_ids": [dict(top) for top in ids] or None,
            "text_offset": list(offsets),
        }

    def _token(self, token: int, logprob: float) -> Object:
        text = self._text(token)
        spelled: list[int] | None = None if "\ufffd" in text else list(text.encode())
        return {
            "token": text,
            "token_id": token,
            "logprob": _number(logprob),
            "bytes": None if spelled is None else [*spelled],
        }

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._chat.tokenizer.decode([token], skip_special_tokens=False))
        return self._texts[token]


def _number(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST
