"""Token ids as they come → text as it comes: decoding, stop strings, reasoning.

A token may be a part of a character, a stop string or a tag may begin in one token and end in another: text that may
still turn out to be something else is held back until the next tokens decide. Joined together, the text is exactly what
decoding all tokens at once gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.chat import Chat
from distill.prompts.prompt import END_THINK, THINK

INCOMPLETE = "\ufffd"  # what a decoder makes of a part of a character
MOST_HELD = 64  # tokens; more are no character, and decoding all of them at each token would take forever
MOST_CONTEXT = 16  # tokens of a prompt that are tried as the context of its completion


class Decoder:
    """Token ids of one completion → text. The token that ends a turn has no text.

    after: ids that the completion continues. SentencePiece tokenizers drop a space at the beginning of a text, so what
    continues one is decoded together with its end; the answer of a chat begins a text.
    """

    def __init__(self, chat: Chat, after: Sequence[int] = ()) -> None:
        self._chat = chat
        self._ids: list[int] = self._context(after)
        self._begin, self._end = 0, len(self._ids)  # ids[begin:end] are the context of those that follow

    def feed(self, ids: Sequence[int], last: bool) -> str:
        """The text that became certain. last: whether these are the last tokens."""
        self._ids += [token for token in ids if token not in self._chat.stop_token_ids]
        before = self._text(self._begin, self._end)
        after = self._text(self._begin, len(self._ids))
        held = after.endswith(INCOMPLETE) and len(self._ids) - self._end <= MOST_HELD
        if len(after) <= len(before) or (held and not last):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return after[len(before) :]

    def _context(self, ids: Sequence[int]) -> list[int]:
        """The fewest last ids that have a text of whole characters; empty where none of the last few have."""
        last = [token for token in ids[-MOST_CONTEXT:] if token not in self._chat.stop_token_ids]
        for begin in reversed(range(len(last))):
            text = self._chat.decode(last[begin:])
            if text and INCOMPLETE not in text:
                return last[begin:]
        return []

    def _text(self, begin: int, end: int) -> str:
        return self._chat.decode(self._ids[begin:end])


class StopStrings:
    """Ends a text before the first of some strings. stopped: whether that has happened."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.stopped = False

    def feed(self, text: str, last: bool) -> str:
        """The text that is certainly before a stop string."""
        if self.stopped or not self._strings:
            return "" if self.stopped else text
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = 0 if last else max(_overlap(self._held, string) for string in self._strings)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


@dataclass(frozen=True)
class Split:
    """A part of an answer: some reasoning, then some content."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """A text → what is inside the think block at its beginning, and what follows it, without the white space around.

    A text that does not begin with the block is all content.
    """

    def __init__(self) -> None:
        self._held = ""
        self._part = "start"  # then "reasoning" or "content"
        self._empty = True  # nothing of this part has come yet

    def feed(self, text: str, last: bool) -> Split:
        """The parts that became certain."""
        self._held += text
        if self._part == "start":
            beginning = self._held.lstrip()
            if not last and THINK.startswith(beginning[: len(THINK)]) and len(beginning) < len(THINK):
                return Split()
            if not beginning.startswith(THINK):
                self._part, self._empty = "content", False  # its white space is its own
            else:
                self._part, self._held = "reasoning", beginning[len(THINK) :]
        reasoning = ""
        if self._part == "reasoning":
            inside, closed, after = self._held.partition(END_THINK)
            if not closed and not last:
                keep = max(len(inside) - len(inside.rstrip()), _overlap(inside, END_THINK))
                certain = inside[: len(inside) - keep].rstrip()  # white space before a half tag may be at the end
                self._held = inside[len(certain) :]
                return Split(reasoning=self._stripped(certain))
            reasoning = self._stripped(inside.rstrip())
            self._held = after
            self._part, self._empty = "content", True
        certain, self._held = self._held, ""
        return Split(reasoning, self._stripped(certain))

    def _stripped(self, text: str) -> str:
        """Without white space at the beginning of a part."""
        text = text.lstrip() if self._empty else text
        self._empty = self._empty and not text
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
