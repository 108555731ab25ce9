"""A streamed reply: server-sent events that are put together into the answer that an unstreamed reply would hold.

Streaming distinguishes a long answer from a silent server: without a token for some time, the request has failed.
"""

from collections.abc import Mapping

from distill.backends.reply import (
    REASONING,
    REFUSED,
    Counts,
    Reply,
    Reported,
    Tokens,
    Unreadable,
    as_object,
    counts_of,
    joined_parts,
    read_json,
    reply_of,
    reported,
    shared_usage,
    thinking_parts,
)
from distill.traces.trace import ReasoningForm

DATA, END = b"data:", b"[DONE]"
MOST_CHOICES = 1024  # of one answer


class _Answer:
    """One choice, as far as it has come."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._form: ReasoningForm | None = None  # the field in which the reasoning comes
        self._tokens = Tokens()
        self.finish_reason: object = None

    def add(self, chunk: Mapping[str, object], choice: Mapping[str, object]) -> None:
        """Add a part. Errors: Unreadable."""
        delta = as_object(choice.get("delta") or {}, "a delta")
        self._content.append(joined_parts(delta.get("content"), "content"))
        if isinstance(refusal := delta.get(REFUSED), str):
            self._refusal.append(refusal)
        self._form = self._form or next((name for name in REASONING if delta.get(name)), None)
        self._reasoning.append(joined_parts(delta.get(self._form or REASONING[0]), "reasoning"))
        self._reasoning.append(joined_parts(thinking_parts(delta.get("content")), "reasoning"))
        self._tokens.add(chunk, choice)
        if choice.get("error"):
            raise Reported(choice["error"])
        if choice.get("finish_reason"):
            self.finish_reason = choice["finish_reason"]

    def reply(self, usage: object) -> Reply:
        """The whole answer. Errors: Unreadable."""
        message = {"content": "".join(self._content), self._form or REASONING[0]: "".join(self._reasoning)}
        message[REFUSED] = "".join(self._refusal)
        return reply_of(message, self.finish_reason, usage, self._tokens)


class Stream:
    """One streamed chat completion. Feed it the bytes as they come, then ask for the `reply`, or the `replies`.

    choices: that were asked for.
    """

    def __init__(self, choices: int = 1) -> None:
        self._choices = choices
        self._usage: object = None
        self._rest = b""  # of a line whose end has not arrived
        self._answers: dict[int, _Answer] = {}
        self.ended = False  # as the server says; what may follow is no part of an answer
        self.deltas = 0  # parts with something of an answer

    def feed(self, part: bytes) -> None:
        """Read some bytes. Errors: Unreadable."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            self._read(line)

    def interrupt(self) -> None:
        """The bytes end here: drop a line whose end has not arrived."""
        self._rest = b""

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason: nothing of an answer can follow, only the counts of tokens."""
        return sum(answer.finish_reason is not None for answer in self._answers.values()) >= self._choices

    def replies(self) -> dict[int, Reply | Unreadable]:
        """The choices by their index, as `reply.read_replies` gives them. Errors: Unreadable when there is none."""
        self._read(self._rest)
        self._rest = b""
        answers = self._answers or {0: _Answer()}
        usage = self._usage if len(answers) == 1 else shared_usage(self._usage)
        replies: dict[int, Reply | Unreadable] = {}
        for index, answer in answers.items():
            try:
                if not self.ended and answer.finish_reason is None:
                    raise Unreadable("it was cut off in the middle")
                replies[index] = answer.reply(usage)
            except Unreadable as error:
                replies[index] = error
        return replies

    @property
    def usage(self) -> Counts:
        """The tokens of all choices."""
        return counts_of(self._usage)

    def reply(self) -> Reply:
        """The first choice. Errors: Unreadable when the stream ended in the middle, or holds no answer."""
        reply = next(iter(self.replies().values()))
        if isinstance(reply, Unreadable):
            raise reply
        return reply

    def _read(self, line: bytes) -> None:
        if not line.startswith(DATA):  # comments keep a connection alive; names of events say nothing more
            return
        data = line[len(DATA) :].strip()
        if data == END:
            self.ended = True
            return
        chunk = as_object(read_json(data), "a part of the stream")
        if error := reported(chunk):
            raise error
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise Unreadable("its choices are not a list")
        for choice in (as_object(choice, "a choice") for choice in choices[:MOST_CHOICES]):
            self.deltas += bool(choice.get("delta") or choice.get("finish_reason"))
            index = choice.get("index")
            number = index if isinstance(index, int) and 0 <= index < MOST_CHOICES else 0
            self._answers.setdefault(number, _Answer()).add(chunk, choice)
