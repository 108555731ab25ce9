"""Counts of what was read, and the notes that a user gets of them.

What is legal but may not be meant is counted and not refused: rows without a gold answer, prompts that occur twice,
questions that differ in case or white space only, questions with two different gold answers, conversations whose last
turns are not asked, columns that may be a part of the question and are not asked, and questions that do not name the
function that their tests call.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from distill.prompts.code_tests import function_not_named
from distill.prompts.prompt import Prompt

SHOWN = 60  # characters of a question in a note


@dataclass
class PromptCounts:
    """Counts over all sources.

    seen: prompt id → how often. rows: source → rows read. unanswered: source → rows without a gold answer where one is
    asked for; first_unanswered: source → the place of the first. cut: source → conversations that lost turns after
    their last question. outside: source → rows outside the window of dates. unnamed: source → problems whose question
    does not name the function that their tests call; first_unnamed: source → the first such function, and its place.
    similar, contradictory: prompts whose question was read before, in another spelling or with another gold answer; the
    example is such a question. unasked: source → columns that may be a part of the question and are not asked, with the
    rows that have one. ended: why a mixture ended before its other sources did.
    """

    seen: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    first_unanswered: dict[str, str] = field(default_factory=dict)
    cut: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    unasked: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unnamed: Counter[str] = field(default_factory=Counter)
    first_unnamed: dict[str, str] = field(default_factory=dict)
    similar: int = 0
    contradictory: int = 0
    similar_example: str = ""
    contradictory_example: str = ""
    ended: str | None = None
    _questions: dict[bytes, bytes] = field(default_factory=dict)  # question without spelling → as first spelled

    def add(self, prompt: Prompt) -> bool:
        """Count a prompt; whether it is the first with its id."""
        self.seen[prompt.id] += 1
        if self.seen[prompt.id] > 1:
            return False
        turns = [f"{message['role']}\0{message['content']}" for message in prompt.messages]
        spelled, plain = _hash("\0".join(turns)), _hash("\0".join(" ".join(turn.casefold().split()) for turn in turns))
        if plain not in self._questions:
            self._questions[plain] = spelled
        elif self._questions[plain] == spelled:
            self.contradictory += 1
            self.contradictory_example = self.contradictory_example or _shown(prompt)
        else:
            self.similar += 1
            self.similar_example = self.similar_example or _shown(prompt)
        return True

    def note_function(self, source: str, where: str, prompt: Prompt) -> None:
        """Count a problem of code with tests, where its function can only be guessed."""
        asked = "\n".join(message["content"] for message in prompt.messages)
        if (function := function_not_named(prompt.answer or "", asked)) is not None:
            self.unnamed[source] += 1
            self.first_unnamed.setdefault(source, f"{function}, {where}")

    @property
    def repeated(self) -> int:
        """How many prompts repeat an earlier one."""
        return self.seen.total() - len(self.seen)

    def notes_on_functions(self) -> list[str]:
        """One line for each source with questions that do not name the function of their tests."""
        return [
            f"{source}: {count:,} of {self.rows[source]:,} questions do not name the function that their tests call "
            f"(first: {self.first_unnamed[source]}), and an answer can only guess it; show the tests, or a column "
            f"that has the name, with `template`"
            for source, count in self.unnamed.items()
        ]

    def notes(self) -> list[str]:
        """One line for each thing that may not be meant."""
        notes = [
            f"{source}: {count:,} of {self.rows[source]:,} problems have no gold answer "
            f"(first: {self.first_unanswered[source]})"
            for source, count in self.unanswered.items()
        ]
        notes += [
            f"{source}: {count:,} of {self.rows[source]:,} conversations go on after the last question; those turns "
            f"are not asked"
            for source, count in self.cut.items()
        ]
        notes += [
            f"{source}: all {count:,} problems are outside the window of `since` and `until`"
            for source, count in self.outside.items()
            if not self.rows[source]
        ]
        notes += [
            f"{source}: columns that may be part of the question are not asked: "
            f"{', '.join(f'{name} ({rows:,} of {self.rows[source]:,} problems)' for name, rows in columns.items())}; "
            f"set {_settings(columns)}"
            for source, columns in self.unasked.items()
            if columns
        ]
        notes += self.notes_on_functions()
        if self.repeated:
            notes.append(f"{self.repeated:,} of {self.seen.total():,} prompts repeat an earlier one and are read once")
        if self.contradictory:
            notes.append(
                f"{self.contradictory:,} of {len(self.seen):,} prompts ask the question of an earlier one with another "
                f"gold answer, such as {self.contradictory_example!r}; all are kept"
            )
        if self.similar:
            notes.append(
                f"{self.similar:,} of {len(self.seen):,} prompts differ from an earlier one in case or white space "
                f"only, such as {self.similar_example!r}; all are kept"
            )
        return notes + ([self.ended] if self.ended else [])


def _settings(columns: Iterable[str]) -> str:
    """The settings of a source that ask such columns."""
    of = {"options": "options", "choices": "options", "system": "system", "system_prompt": "system"}
    settings = [f"`{of[name]}: {name}`" for name in columns if name in of]
    if rest := [f"{{{{{name}}}}}" for name in columns if name not in of]:
        settings.append(f"`template: '{{{{question}}}} {' '.join(rest)}'`")
    return " and ".join(settings)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:12]


def _shown(prompt: Prompt) -> str:
    text = " ".join(prompt.messages[-1]["content"].split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
