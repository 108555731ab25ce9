"""A streamed reply: server-sent events that are put together into the answer that an unstreamed reply would hold.

Streaming distinguishes a long answer from a silent server: without a token for some time, the request has failed.
"""

from distill.backends.reply import (
    REASONING,
    Reply,
    Tokens,
    Unreadable,
    as_object,
    joined_parts,
    read_json,
    reply_of,
)
from distill.traces.trace import ReasoningForm

DATA, END = b"data:", b"[DONE]"


class Stream:
    """One streamed chat completion. Feed it the bytes as they come, then ask for the `reply`."""

    def __init__(self) -> None:
        self._rest = b""  # of a line whose end has not arrived
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._form: ReasoningForm | None = None  # the field in which the reasoning comes
        self._finish_reason: object = None
        self._usage: object = None
        self._tokens = Tokens()
        self._ended = False

    def feed(self, part: bytes) -> None:
        """Read some bytes. Errors: Unreadable."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            self._read(line)

    def reply(self) -> Reply:
        """The whole answer. Errors: Unreadable when the stream ended in the middle, or holds no answer."""
        self._read(self._rest)
        if not self._ended and self._finish_reason is None:
            raise Unreadable("it was cut off in the middle")
        message = {"content": "".join(self._content), "reasoning_content": "".join(self._reasoning)}
        if self._form is not None:
            message = {"content": message["content"], self._form: message["reasoning_content"]}
        return reply_of(message, self._finish_reason, self._usage, self._tokens)

    def _read(self, line: bytes) -> None:
        if not line.startswith(DATA):  # comments keep a connection alive; names of events say nothing more
            return
        data = line[len(DATA) :].strip()
        if data == END:
            self._ended = True
            return
        chunk = as_object(read_json(data), "a part of the stream")
        if chunk.get("error"):
            raise Unreadable("the server reported an error in the middle")
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise Unreadable("its choices are not a list")
        for choice in (as_object(choice, "a choice") for choice in choices[:1]):
            delta = as_object(choice.get("delta") or {}, "a delta")
            self._content.append(joined_parts(delta.get("content"), "content"))
            self._form = self._form or next((name for name in REASONING if delta.get(name)), None)
            self._reasoning.append(joined_parts(delta.get(self._form or REASONING[0]), "reasoning"))
            self._tokens.add(chunk, choice)
            if choice.get("finish_reason") is not None:
                self._finish_reason = choice["finish_reason"]
