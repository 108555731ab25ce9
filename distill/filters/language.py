"""Language mixing: reasoning that leaves the language of its prompt, the flaw of R1-Zero.

Two rules, on the text without its code:

- *Script.* A word in a script that the conversation does not use, such as Han characters in an English solution, is
  found by the names of its characters in the Unicode database: exact, and free for text in ASCII. Greek letters and the
  letters of mathematical alphabets are symbols, not words; five Greek letters in a row are a word.
- *Language.* Within a script, and outside of formulas, each sentence of at least `WORDS` words is identified by
  py3langid. It counts as foreign when the prompt's language is improbable (below `IMPROBABLE`) and another one is
  likely (above `LIKELY`); comparing with the prompt's language alone makes it irrelevant whether Spanish was taken for
  Portuguese. English sentences with enough function words skip the detector, which reads a byte at a time: most
  sentences of most traces.

py3langid (4.5 MB, 80 µs a sentence) mistook none of 8,856 sentences of real solutions at these limits. Rejected:
lingua, which took 1 GB of memory, 2 ms a sentence, and called formulas in words Latin at 0.95; a share of ASCII
letters, which cannot tell German from English.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field, field_validator

from distill.filters.base import OK, Candidate, Example, TraceFilter
from distill.filters.words import UNSPACED
from distill.prompts.prompt import END_THINK, THINK
from distill.traces.trace import Trace, Verdict

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

WORDS = 4  # of a sentence that a detector can judge
CHARACTERS = 10  # of one in a script without spaces between words
IMPROBABLE, LIKELY = 0.01, 0.3  # in real solutions English had 0.05 or more, in foreign sentences 0.0002 or less
RARE = ("la", "wuu", "yue", "pcm", "hbo", "grc", "sa", "zxx")  # formulas in words pass for these; Chinese stays zh
CLEAR = 0.5  # probability of the best language, below which a text has too few words to say
ACCEPTED = 0.05  # probability from which a language counts as the prompt's: Spanish and Galician are hard to separate
SHORTEST_WORD = {"Han": 1, "Kana": 1, "Greek": 5}  # letters that make a word; two in other scripts
FUNCTION_WORDS = re.compile(
    r"\b(?:the|of|to|and|that|this|these|those|there|with|for|from|by|are|were|be|been|has|have|had|can|could|will|would|"
    r"should|which|what|when|where|who|how|each|their|they|he|she|his|her|its|it|you|your|my|our|if|then|than|because|"
    r"so|since|therefore|let's|let|we|but|not|only|both|between|into)\b",
    re.IGNORECASE,
)
ENGLISH_SHARE = 0.2  # of function words, from which a sentence is English without a detector

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
FORMULA = re.compile(  # bounded, or every opening without its end would be searched for to the end of the text
    r"\$\$.{0,2000}?\$\$|\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|\$[^$\n]+\$"
    r"|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}",
    re.DOTALL,
)
PROSE = re.compile(r"(?:[^\W\d_]{2,30}[\s,]{1,9}){2}[^\W\d_]{2}")  # three words: text between amounts, not a formula
COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})?|https?://\S+")
SENTENCE = re.compile(r"(?<=[.!?:;])\s+|\n+|(?<=[\u3002\uff01\uff1f\uff1b])")
WORD = re.compile(  # between spaces and punctuation: names in code are none
    rf"(?<![^\s\"'(«“¡¿-])[^\W\d_]{{2,}}(?:['’][^\W\d_]+)?(?![^\s.,;:!?)\"'»”-])|{UNSPACED}+"
)
FOREIGN_LETTERS = re.compile(r"[^\W\d_\x00-\u024f]+")  # beyond Latin
SCRIPTS = {  # first word of a character's name → script; other letters, such as those of formulas, have none
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    **{
        name.upper(): name
        for name in ("Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian")
    },
    **{name.upper(): name for name in ("Greek", "Gujarati", "Gurmukhi", "Hangul", "Hebrew", "Kannada", "Khmer", "Lao")},
    **{name.upper(): name for name in ("Malayalam", "Mongolian", "Myanmar", "Sinhala", "Tamil", "Telugu", "Thai")},
    "TIBETAN": "Tibetan",
}


class Foreign(NamedTuple):
    """A passage that leaves the prompt's language. reason: with its details. characters: its length."""

    reason: str
    text: str
    characters: int


class Language(TraceFilter):
    """Drop traces that reason in a script or language other than the prompt's. Code and formulas are not looked at."""

    also: tuple[str, ...] = Field(
        (), description="languages accepted beside the prompt's, as ISO 639-1 codes: [en] for teachers that think so"
    )
    tolerance: float = Field(
        0.0, ge=0, lt=1, description="share of a trace's characters that may be in another script or language"
    )

    name = "language"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "in the prompt's language, as far as can be said",
        "other_script": "words in a script that the conversation does not use, which is named",
        "other_language": "sentences in another language, which is named",
    }
    examples = (
        Example(OK, "<think>\nFirst we add the two numbers, so that x = 20 + 22.\n</think>\nThe answer is 42."),
        Example(OK, "<think>\nLet \u03b1 + \u03b2 = π in \u211d, so the sum of the angles is known.\n</think>\n42"),
        Example(OK, "<think>\nThis prints it: ```print('你好')  # 所以```, so the program is done.\n</think>\n42"),
        Example("other_script: Han", "<think>\nFirst we add the two numbers, 所以 the sum is 42.\n</think>\n42"),
        Example("other_script: Hangul", "<think>\n먼저 두 수를 더합니다.\n</think>\n42"),
        Example(
            "other_language: de",
            "<think>\nWe add the two numbers, and then we check that the result is right, because it is easy to "
            "make a mistake. Zuerst addieren wir die beiden Zahlen, um die Summe zu finden.\n</think>\n42",
        ),
        Example(
            OK,
            "<think>\nZuerst addieren wir die beiden Zahlen, um die Summe zu finden.\n</think>\n42",
            {"also": ["de"]},
        ),
        Example(
            OK, "<think>\n" + "We add the two numbers to find the sum. " * 9 + "所以\n</think>\n42", {"tolerance": 0.1}
        ),
    )

    @field_validator("also")
    @classmethod
    def _known(cls, also: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [code for code in also if not re.fullmatch("[a-z]{2,3}", code)]:
            raise ValueError(f"{unknown[0]!r} is no language code; write codes such as en, zh, de")
        return also

    def judge(self, candidate: Candidate) -> Verdict:
        """Compare script and language with the prompt's. The evidence has the share of foreign text and its beginning.

        The response to a `chat` prompt is not judged: it may have been asked for in another language.
        """
        trace = candidate.trace
        text = (trace.reasoning or "") if trace.prompt.task == "chat" else trace.text
        total = sum(map(len, text.split()))
        passages = list(self._foreign(trace, text))
        share = min(1.0, sum(passage.characters for passage in passages) / total) if total else 0.0
        if not passages or share <= self.tolerance:
            return self.verdict(OK)
        longest = max(passages, key=lambda passage: passage.characters)
        return self.verdict(longest.reason, share=round(share, 4), passages=len(passages), text=longest.text[:120])

    def _foreign(self, trace: Trace, text: str) -> Iterator[Foreign]:
        asked = "\n".join(message["content"] for message in trace.prompt.messages)
        known = {script for run in FOREIGN_LETTERS.findall(asked) for script in _scripts(run)}
        for run in FOREIGN_LETTERS.findall(CODE.sub(" ", text)):
            for script, letters in _scripts(run).items():
                if script not in known and letters >= SHORTEST_WORD.get(script, 2):
                    yield Foreign(f"other_script: {script}", run, letters)
        expected = _prompt_languages(trace.prompt.messages[-1]["content"]) or _languages(text)
        if not expected:
            return
        accepted = {*expected, *self.also}
        for sentence in SENTENCE.split(prose(text)):
            words = WORD.findall(sentence)
            if not _is_long(words) or ("en" in accepted and _is_plain_english(words)):
                continue
            joined = " ".join(words)
            ranked = dict(_detector().rank(joined))
            best = next(iter(ranked))
            if ranked[best] > LIKELY and all(ranked.get(language, 0) < IMPROBABLE for language in accepted):
                yield Foreign(f"other_language: {best}", sentence.strip(), sum(map(len, words)))


def prose(text: str) -> str:
    """The text without code, formulas, LaTeX commands, addresses and the tags around the reasoning."""
    text = CODE.sub(" ", text.replace(THINK, " ").replace(END_THINK, " "))
    return COMMAND.sub(" ", FORMULA.sub(_without_formula, text))


def _without_formula(match: re.Match[str]) -> str:
    """Nothing, or what a pair of delimiters encloses where that is prose: a stray `$`, or a sentence in a formula."""
    inner = COMMAND.sub(" ", match[0])
    return f" {inner} " if PROSE.search(inner) else " "


def _is_long(words: list[str]) -> bool:
    return len(words) >= WORDS or sum(len(re.findall(UNSPACED, word)) for word in words) >= CHARACTERS


def _is_plain_english(words: list[str]) -> bool:
    return len(FUNCTION_WORDS.findall(" ".join(words))) >= ENGLISH_SHARE * len(words)


def _languages(text: str) -> frozenset[str]:
    """The languages that a text may be in; empty where it has too few words to say."""
    words = WORD.findall(prose(text[:8192]))
    if not _is_long(words):
        return frozenset()
    ranked = _detector().rank(" ".join(words))
    is_clear = ranked[0][1] > CLEAR
    return frozenset(code for code, probability in ranked if probability > ACCEPTED) if is_clear else frozenset()


_prompt_languages = lru_cache(maxsize=1024)(_languages)


def _scripts(run: str) -> dict[str, int]:
    """Script → letters, of a run of letters beyond Latin."""
    counts: dict[str, int] = {}
    for letter in run:
        if script := _script(letter):
            counts[script] = counts.get(script, 0) + 1
    return counts


@lru_cache(maxsize=8192)
def _script(letter: str) -> str | None:
    return SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0])


@lru_cache(maxsize=1)
def _detector() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    detector.set_languages([code for code in detector.labels if code not in RARE])
    return detector
