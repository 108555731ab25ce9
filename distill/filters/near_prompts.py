"""Near-duplicates among prompts: the same problem with another greeting, another instruction, a typo.

A collection of problems that was put together from several sources asks many of them twice, and then a student sees
them twice as often. What makes another problem of nearly the same words is compared exactly, in its order: numbers (in
figures or words), mathematical symbols (all that Unicode knows, LaTeX's commands for them, and brackets beside numbers
and operators), and words such as *not*, *maximum*, *product* or *perimeter*. Two problems of one mould with other
numbers are two problems. The marks of Markdown and tags such as `<answer>` are no symbols.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from distill.filters.base import OK, Group
from distill.filters.judged import Judged, Key
from distill.filters.near import NearDuplicates
from distill.filters.symbols import COMMANDS, MARKUP, SPELLINGS, TOKEN
from distill.filters.terms import NUMBERS, SEPARATOR
from distill.traces.trace import Trace

DECISIVE = frozenset(  # words that make another problem; words for numbers are in NUMBERS
    re.findall(
        r"\w+",
        "not no without except never at least most more less fewer greater smaller larger maximum minimum maximal "
        "minimal max min greatest smallest largest lowest highest sum difference product quotient remainder mean "
        "median mode average variance area perimeter volume circumference radius diameter sin cos tan log ln sine "
        "cosine tangent increase increases increased decrease decreases decreased positive negative even odd "
        "before after first last and or true false prove disprove",
    )
)
WORDS = re.compile(r"[\w\\]+")
ASKED = "Ann buys three pears and twice as many plums at the market on Monday morning. How many fruits does she buy?"


class NearPrompts(NearDuplicates):
    """Drop the traces of prompts that are nearly the same as another prompt with the same numbers and operators."""

    shingle: int = Field(2, ge=1, le=64, description="words in a shingle")

    name = "near_prompts"
    version = 2  # other gold answers make other problems
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "no similar prompt comes before it",
        "near_duplicate": "a similar prompt has traces too, and comes first in the order of their ids",
    }
    examples = (
        Group((OK, "near_duplicate"), ("a", "b"), questions=(ASKED, f"{ASKED} Please!")),
        Group((OK, OK), ("a", "b"), questions=("20 + 22?", "21 + 22?")),
        Group((OK, OK), ("a", "b"), questions=("What is 20 + 22?", "What is 20 - 22?")),
        Group((OK, OK), ("a", "b"), questions=(ASKED, ASKED.replace("three", "four"))),
        Group((OK, OK), ("a", "b")),
    )

    def text_of(self, trace: Trace) -> str:
        """The words of the conversation, without punctuation; without words, its characters."""
        asked = _asked(trace)
        return " ".join(WORDS.findall(asked)) or asked

    def salt_of(self, trace: Trace) -> int:
        """The numbers, operators and decisive words of the conversation, in order, and the gold answer."""
        tokens = TOKEN.findall(SEPARATOR.sub("", MARKUP.sub(" ", _asked(trace))))
        decisive = "\0".join((" ".join(filter(None, map(_decisive, tokens))), trace.prompt.answer or ""))
        return int.from_bytes(hashlib.blake2b(decisive.encode(errors="surrogatepass"), digest_size=8).digest(), "big")

    def unit_of(self, judged: Judged) -> Key:
        """All traces of a prompt."""
        return judged.key[0], 0


def _decisive(token: str) -> str:
    """A token in its one spelling; empty for a word that makes no other problem."""
    name = token.removeprefix("\\")
    if name != token and name in COMMANDS:
        return f"\\{SPELLINGS.get(name, name)}"
    word = SPELLINGS.get(name, name.lower())
    return NUMBERS.get(word, word) if not word.isalpha() or word in NUMBERS or word in DECISIVE else ""


def _asked(trace: Trace) -> str:
    return "\n".join(message["content"] for message in trace.prompt.messages)
