"""Near-duplicates among prompts: the same problem with another greeting, another instruction, a typo.

A collection of problems that was put together from several sources asks many of them twice, and then a student sees
them twice as often. Numbers are compared exactly: two problems of one mould with other numbers are two problems.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from distill.filters.base import OK, Group
from distill.filters.judged import Judged, Key
from distill.filters.near import NearDuplicates
from distill.traces.trace import Trace

NUMBER = re.compile(r"\d+(?:\.\d+)?")
WORDS = re.compile(r"[\w\\]+")
ASKED = "Ann buys three pears and twice as many plums at the market on Monday morning. How many fruits does she buy?"


class NearPrompts(NearDuplicates):
    """Drop the traces of prompts that are nearly the same as another prompt with the same numbers."""

    shingle: int = Field(2, ge=1, le=64, description="words in a shingle")

    name = "near_prompts"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "no similar prompt comes before it",
        "near_duplicate": "a similar prompt has traces too, and comes first in the order of their ids",
    }
    examples = (
        Group((OK, "near_duplicate"), ("a", "b"), questions=(ASKED, f"{ASKED} Please!")),
        Group((OK, OK), ("a", "b"), questions=("20 + 22?", "21 + 22?")),
        Group((OK, OK), ("a", "b")),
    )

    def text_of(self, trace: Trace) -> str:
        """The words of the conversation, without punctuation."""
        return " ".join(WORDS.findall(_asked(trace)))

    def salt_of(self, trace: Trace) -> int:
        """The numbers of the conversation, in order."""
        numbers = " ".join(NUMBER.findall(_asked(trace)))
        return int.from_bytes(hashlib.blake2b(numbers.encode(), digest_size=8).digest(), "big")

    def unit_of(self, judged: Judged) -> Key:
        """All traces of a prompt."""
        return judged.key[0], 0


def _asked(trace: Trace) -> str:
    return "\n".join(message["content"] for message in trace.prompt.messages)
