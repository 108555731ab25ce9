"""Language mixing: reasoning that leaves the language of its prompt, the flaw of R1-Zero.

Two rules, on the text without its code:

- *Script.* A word in a script that the conversation does not use, such as Han characters in an English solution, is
  recognized by the names of its characters in the Unicode database: exact, and free for ASCII text. Greek letters and
  the letters of mathematical alphabets are symbols, not words; Greek letters with an accent are a word.
- *Language.* Within a script, and outside of formulas, each sentence of at least `WORDS` words is identified by
  py3langid. It counts as foreign when every accepted language is improbable (below `IMPROBABLE`) and another one is
  likely (above `LIKELY`); comparing with the accepted languages alone makes it irrelevant whether Spanish was taken for
  Portuguese. Capitalized words are left out: they are names, whose language says nothing. English sentences with enough
  function words skip the detector, as do sentences whose words all occurred in accepted ones: most sentences of most
  traces.

Accepted are the language of the prompt, those that it names as a language (`translate into French`), and `also`.

py3langid (4.5 MB, 80 µs a sentence) mistook none of 8,856 sentences of real solutions at these limits. Rejected:
lingua, which took 1 GB of memory, 2 ms a sentence, and called formulas in words Latin at 0.95; a share of ASCII
letters, which cannot separate German from English.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field, field_validator

from distill.errors import UserError
from distill.filters.base import OK, Candidate, Example, Resources, TraceFilter
from distill.filters.languages import WRITTEN, named_in, script_of
from distill.filters.words import ANY_UNSPACED, FENCE, UNSPACED
from distill.prompts.prompt import END_THINK, THINK, Prompt
from distill.traces.trace import Verdict

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

WORDS, LETTERS = 4, 16  # of a sentence that a detector can judge, names left out
CHARACTERS = 10  # of one in a script without spaces between words
IMPROBABLE, LIKELY = 0.01, 0.3  # in real solutions English had 0.05 or more, in foreign sentences 0.0002 or less
RARE = ("la", "wuu", "yue", "pcm", "hbo", "grc", "sa", "zxx")  # formulas in words pass for these; Chinese stays zh
CLEAR = 0.5  # probability of the best language, below which a text has too few words to say
ACCEPTED = 0.05  # probability from which a language counts as the prompt's: Spanish and Galician are hard to separate
SHORTEST_WORD = {"Han": 1, "Kana": 1, "Greek": 8}  # letters that make a word; two in other scripts
ACCENTED_GREEK = 3  # letters of a Greek word with an accent, which formulas do not have
ENGLISH = frozenset(  # words that only English has
    re.findall(
        r"\S+",
        "the and that this these those there with from been could would should which what when where who how each "
        "their they she its you your our if than because since therefore let's both between",
    )
)
FUNCTION_WORDS = ENGLISH.union(  # and words that other languages have too
    re.findall(
        r"\w+",
        "of to for by are were be has have had can will he his her it my then so let we but not only into",
    )
)
ENGLISH_SHARE = 0.2  # of function words, from which a sentence is English without a detector

CODE = re.compile(rf"{FENCE}.*?(?:^[ \t]*\1|\Z)|```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(  # bounded, or every opening without its end would be searched for to the end of the text
    r"\$\$.{0,2000}?\$\$|\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|\$[^$\n]+\$"
    r"|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}",
    re.DOTALL,
)
PROSE = re.compile(r"(?:[^\W\d_]{2,30}[\s,]{1,9}){2}[^\W\d_]{2}")  # three words: text between amounts, not a formula
COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})?|https?://\S+")
SENTENCE = re.compile(r"(?<=[.!?:;\u061f\u06d4\u0964])\s+|\n+|(?<=[\u3002\uff01\uff1f\uff1b])")
MARKS = r"\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0971-\u0dff\u1000-\u109f"  # vowels and accents are no letters
LETTER = rf"(?:[^\W\d_]|[{MARKS}])"
WORD = re.compile(  # between spaces and punctuation: names in code are none
    rf"(?<![^\s\"'(«“¡¿-]){LETTER}{{2,}}(?:['’]{LETTER}+)?(?![^\s.,;:!?)\"'»”\u0964-])|{UNSPACED}+"
)
FOREIGN_LETTERS = re.compile(rf"[^\W\d_\x00-\u024f](?:[^\W\d_\x00-\u024f]|[{MARKS}])*|[\u2e80-\u2fdf]+")  # beyond Latin


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
    version = 2  # fences of tildes that are indented
    packages = ("py3langid",)
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

    def check(self, resources: Resources) -> None:
        """Load the detector. Errors: UserError for a language in `also` that it does not know."""
        if unknown := sorted({*self.also} - {*_detector().labels}):
            raise UserError(
                f"filter.language.also: {unknown[0]!r} is not a language that can be recognized; use an ISO 639-1 "
                f"code such as en, zh, de ({len(_detector().labels)} languages are known)"
            )

    def judge(self, candidate: Candidate) -> Verdict:
        """Compare script and language with the prompt's and with those that it names. The evidence has the share of
        foreign text and its beginning.

        The response to a `chat` prompt is not judged: it may have been asked for in another language.
        """
        trace = candidate.trace
        text = (trace.reasoning or "") if trace.prompt.task == "chat" else trace.text
        share, passages = foreign(trace.prompt, text, self.also)
        if not passages or share <= self.tolerance:
            return self.verdict(OK)
        longest = max(passages, key=lambda passage: passage.characters)
        return self.verdict(longest.reason, share=round(share, 4), passages=len(passages), text=longest.text[:120])


def foreign(prompt: Prompt, text: str, also: Collection[str] = ()) -> tuple[float, list[Foreign]]:
    """The share of a text's characters that leave the language of its prompt, and the passages that do.

    White space does not count. also: languages accepted beside the prompt's, as ISO 639-1 codes.
    """
    passages = list(_foreign(prompt, text, also))
    total = sum(map(len, text.split()))
    share = min(1.0, sum(passage.characters for passage in passages) / total) if total else 0.0
    return share, passages


def _foreign(prompt: Prompt, text: str, also: Collection[str]) -> Iterator[Foreign]:
    asked = prompt.messages[-1]["content"]
    languages = _prompt_languages(asked)
    accepted = {*languages, *also, *named_in(asked)}
    yield from _foreign_words(text, accepted, "\n".join(message["content"] for message in prompt.messages))
    if languages or (accepted := accepted | _languages(text)):
        yield from _foreign_sentences(text, accepted)


def _foreign_words(text: str, accepted: Collection[str], conversation: str) -> Iterator[Foreign]:
    """Words in scripts that neither the conversation nor an accepted language uses."""
    if text.isascii():
        return
    known = {script for run in FOREIGN_LETTERS.findall(conversation) for script in _scripts(run)}
    known.update(script for language in accepted for script in WRITTEN.get(language, ()))
    for run in FOREIGN_LETTERS.findall(CODE.sub(" ", text)):
        for script, letters in _scripts(run).items():
            if script not in known and letters >= _shortest(script, run):
                yield Foreign(f"other_script: {script}", run, letters)


def _foreign_sentences(text: str, accepted: Collection[str]) -> Iterator[Foreign]:
    """Sentences in a language that is not accepted. A sentence of words that accepted ones had is not looked at."""
    familiar: set[str] = set()
    for sentence in SENTENCE.split(prose(text)):
        words = WORD.findall(sentence)
        if not _is_long(words) or familiar.issuperset(words):
            continue
        if not ("en" in accepted and _is_plain_english(words)):
            joined = " ".join(word for word in words if not word[0].isupper())
            best, _ = _detector().classify(joined)
            if best not in accepted:
                ranked = dict(_detector().rank(joined))
                if ranked[best] > LIKELY and all(ranked.get(language, 0) < IMPROBABLE for language in accepted):
                    yield Foreign(f"other_language: {best}", sentence.strip(), sum(map(len, words)))
                    continue
        familiar.update(words)


def prose(text: str) -> str:
    """The text without code, formulas, LaTeX commands, addresses and the tags around the reasoning."""
    text = CODE.sub(" ", text.replace(THINK, " ").replace(END_THINK, " "))
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)  # decomposed accents, letters of full width
    return COMMAND.sub(" ", FORMULA.sub(_without_formula, text))


def _without_formula(match: re.Match[str]) -> str:
    """Nothing, or what a pair of delimiters encloses where that is prose: a stray `$`, or a sentence in a formula."""
    inner = COMMAND.sub(" ", match[0])
    return f" {inner} " if PROSE.search(inner) else " "


def _is_long(words: list[str]) -> bool:
    """Whether a detector can judge a sentence. Words with a capital letter are names, numerals or abbreviations."""
    if len(words) >= WORDS:
        small = [word for word in words if not word[0].isupper()]
        if len(small) >= WORDS and sum(map(len, small)) >= LETTERS:
            return True
    return _has_unspaced(words)


def _has_unspaced(words: list[str]) -> bool:
    """Whether there are enough characters of scripts that are written without spaces."""
    return any(map(ANY_UNSPACED.match, words)) and sum(len(ANY_UNSPACED.findall(word)) for word in words) >= CHARACTERS


def _is_plain_english(words: list[str]) -> bool:
    small = [word.lower() for word in words]
    return any(map(ENGLISH.__contains__, small)) and sum(
        map(FUNCTION_WORDS.__contains__, small)
    ) >= ENGLISH_SHARE * len(words)


def _languages(text: str) -> frozenset[str]:
    """The languages that a text may be in; empty where it has too few words to say."""
    words = WORD.findall(prose(text[:8192]))
    if len(words) < WORDS and not _has_unspaced(words):
        return frozenset()
    ranked = _detector().rank(" ".join(words))
    is_clear = ranked[0][1] > CLEAR
    return frozenset(code for code, probability in ranked if probability > ACCEPTED) if is_clear else frozenset()


_prompt_languages = lru_cache(maxsize=1024)(_languages)


def _scripts(run: str) -> dict[str, int]:
    """Script → letters, of a run of letters beyond Latin."""
    return Counter(script for script in map(script_of, run) if script)


def _shortest(script: str, run: str) -> int:
    """The letters that a word of this script has at least."""
    if script == "Greek" and len(unicodedata.normalize("NFD", run)) > len(unicodedata.normalize("NFC", run)):
        return ACCENTED_GREEK
    return SHORTEST_WORD.get(script, 2)


@lru_cache(maxsize=1)
def _detector() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    detector.set_languages([code for code in detector.labels if code not in RARE])
    return detector
