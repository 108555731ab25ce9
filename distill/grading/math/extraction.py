"""Extract the final answer of a response, and the gold answer of a data set's answer field, in linear time.

Only text that the response *marks* as its answer can be graded wrong. Where the response has `<answer>…</answer>`, only
the text inside is searched. The marks, and the guesses where there is none:

  boxed       the last `\\boxed{…}`, braces balanced; boxes joined by commas, "and" or labels are one answer
  stated      "the answer is …", "Answer: …"; a stated formula replaces a box that precedes it
  tag         the whole content of `<answer>…`, closed or cut off
  hashes      GSM8K's `#### 42`
  bare        a response that consists of one line with an expression
  sentence    "the answer is …" with prose around the answer; its last formula or number is a guess
  last line   no mark; the last formula or number of the last line is a guess

A guess (`distill.grading.math.guesses`) is correct if it equals the gold answer, and otherwise unverifiable: in "42
dollars in 3 days" the guess 3 must not count as a wrong answer. Rejected: searching the whole response for any number,
which turns "no answer" into "wrong".

Reasoning is not searched: a box inside `<think>` is not an answer.
"""

import re

from distill.grading.grade import Answer
from distill.grading.math.guesses import SENTENCE_END
from distill.grading.math.spelling import ENVIRONMENT, has_words, repaired
from distill.prompts.boxes import boxed, boxed_end, hashes, last_box_end
from distill.prompts.prompt import outside_blocks

CUT_OFF_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")  # in a text without a complete box
TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_sentence)\|>")
STATED = re.compile(
    r"\banswers?[*_]*(?:\s+(?:is|are)\b[*_]*[\s:]*|\s*[:=]\**\s*)|^[ \t]*A:[ \t]*(?=\S)"
    "|\u7b54\u6848[*_]*\\s*(?:\u662f|\u4e3a|:|\uff1a)+[*_\\s:\uff1a]*",
    re.IGNORECASE | re.MULTILINE,
)
SAID = re.compile(r"^\W*(?!and\b|or\b)[A-Za-z]{2,}\s*[:,]|,\s*(?!and\b|or\b)[A-Za-z]{2,}\W*$")  # Sum: 10; 10, QED
BEFORE, LONGEST_SENTENCE = 40, 400  # characters before a statement that say what it is about
QUALITY = r"(?:(?:the|an?|my|correct|right|best|final|most|plausible)\W+){0,4}"
REJECTED = re.compile(
    rf"(?:\b(?:incorrect|wrong|false|other|another|not|neither|than|tempting|rejected|eliminated|remaining)|n't)[^\w.!?\n]+"
    rf"{QUALITY}$"
    rf"|\b(?:some|many|people|students|others?|one|you)\b[^.\n]{{0,20}}\b(?:think|say|guess|believe|assume|claim)\W+"
    rf"(?:that\W+)?{QUALITY}$",
    re.IGNORECASE,
)
OPENING = re.compile(
    r"(?:\W|\b(?:so|thus|hence|therefore|then|and|the|my|our|final|correct|right|which|this|that|gives?|means|finally|in|"
    r"conclusion|summary|overall|is|we|have|get|find)\b)*",
    re.IGNORECASE,
)
CONTRAST = re.compile(r"\s*,\s*(?:and\s+|but\s+)?not\s[^,]*$")  # "5, not 6"
DISPLAY = re.compile(r"(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$)", re.DOTALL)
MISSING = {"nan", "none", "null", "n/a", "<na>"}  # spellings of a missing value in tables


def scope_of(response: str) -> tuple[str, bool]:
    """Return the part of a response that may contain the answer, and whether `<answer>` marks it. Reasoning is
    excluded."""
    text = TURN.split(outside_blocks(response), maxsplit=1)[0].strip()
    tagged = text.rpartition("<answer>")[2].partition("</answer>")[0].strip() if "<answer>" in text else ""
    return tagged or text, bool(tagged)


def final_answer(response: str) -> Answer | None:
    """Extract the answer of a completion. Reasoning is not searched, whether or not its block is closed."""
    scope, tagged = scope_of(_unescaped(response))
    box = boxed(scope)
    stated, begin = _stated(scope)
    if box and stated and begin >= last_box_end(scope) and _replaces_a_box(scope, begin, stated):
        return Answer(_trim(stated), "stated")
    plain = not stated or _is_formula(stated)
    for method, text in (
        ("boxed", box),
        ("stated", stated if tagged and stated and plain else None),
        ("tag", _one_line(scope) if tagged else None),
        ("hashes", hashes(scope)),
        ("stated" if plain else "sentence", stated),
        ("bare", _one_line(scope) if _is_formula(scope) and not has_words(scope) and not SAID.search(scope) else None),
        ("last line", scope.splitlines()[-1] if scope else None),
    ):
        if text and not (method != "boxed" and CUT_OFF_BOX.search(text)):
            trimmed = _trim(text)
            if trimmed:
                return Answer(trimmed, method)
    return None


def gold_answer(gold: str) -> str:
    """Extract the gold answer of an answer field: the answer, or a solution that ends with a box, `####` or `A:`.

    Returns an empty string for the spellings of a missing value (`MISSING`).
    """
    text = _unescaped(gold).strip()
    if text.casefold() in MISSING:
        return ""
    answer = boxed(text) or hashes(text)
    if answer is None and (cut := CUT_OFF_BOX.search(text)):
        answer = text[cut.end() :].rstrip("} ")
    if answer is None and "\n" in text and text.splitlines()[-1].startswith("A:"):
        answer = text.splitlines()[-1][2:]
    if answer is None and len(text) > 200 and (stated := _stated(text)[0]) and _is_formula(stated):
        answer = stated
    return _trim(answer or text)


def _unescaped(text: str) -> str:
    text = repaired(text).replace(r"\\boxed", r"\boxed")
    return text if r"\begin" in text else re.sub(r"\\\\(?=[()%])", r"\\", text)


def _stated(text: str) -> tuple[str | None, int]:
    """Return the text after the last "answer is" or "answer:", up to the end of its sentence, and its start offset."""
    matches = [match for match in STATED.finditer(text) if not denied(text, match.start())]
    if not matches:
        return None, 0
    end = matches[-1].end()
    rest = text[end:]
    if display := DISPLAY.match(rest):
        return (display[1] or display[2] or "").strip() or None, end
    if (box := boxed_end(text, end)) is not None:
        return text[end:box], matches[-1].start()
    line = rest.partition("\n")[0]
    return CONTRAST.sub("", SENTENCE_END.split(line, maxsplit=1)[0]) or None, end


def denied(text: str, place: int) -> bool:
    """Whether the words before a statement say that its answer is not the right one: "a common wrong answer is"."""
    return REJECTED.search(text, max(0, place - BEFORE), place) is not None


def _replaces_a_box(text: str, begin: int, stated: str) -> bool:
    """Whether a statement after a box says the answer anew: a formula and no word, in a sentence that begins with the
    statement. "The answer is correct" and "for n = 3 the answer is 6" do not."""
    before = text[max(0, begin - LONGEST_SENTENCE) : begin]
    match = list(STATED.finditer(before + " "))
    sentence = SENTENCE_END.split(before[: match[-1].start()] if match else before)[-1].rpartition("\n")[2]
    number = re.search(r"[\d\\=+*/^]|\bpi\b", stated) or len(_trim(stated)) == 1
    return bool(number) and _is_formula(stated) and OPENING.fullmatch(sentence) is not None


def _is_formula(text: str) -> bool:
    """Return whether a stated text can replace a box: an expression, perhaps with a unit, without prose."""
    trimmed = _trim(text)
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", ENVIRONMENT.sub("", trimmed)))
    return bool(trimmed) and len(trimmed) <= 200 and len(words) <= 1


def _one_line(text: str) -> str | None:
    return text if text and "\n" not in text and len(text) <= 200 else None


def _trim(text: str) -> str:
    """Remove white space, Markdown's asterisks, a full stop, quotes and one pair of math delimiters from the ends."""
    text = text.strip().strip("*").strip()
    text = re.sub(r"(?<!\\right)(?<!\.\.)\.$", "", text).strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`" and text.count(text[0]) == 2:
        text = text[1:-1].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            return inner.strip()
    return text
