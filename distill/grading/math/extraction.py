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

An answer that is taken back ("Wait, that is wrong") is neither right nor wrong. Where words give another answer after
it (`distill.grading.math.statements`), it is right or wrong only if both are.

Reasoning is not searched: a box inside `<think>` is not an answer.
"""

import re
from dataclasses import replace

from distill.grading.grade import TAKEN_BACK, Answer
from distill.grading.math.spelling import has_words, repaired
from distill.grading.math.statements import Statement, afterthought, is_formula, replaces, statements, trim
from distill.prompts.boxes import HASHES, boxed, hashes, last_box_end
from distill.prompts.prompt import outside_blocks

CUT_OFF_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")  # in a text without a complete box
TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_sentence)\|>")
SAID = re.compile(r"^\W*(?!and\b|or\b)[A-Za-z]{2,}\s*[:,]|,\s*(?!and\b|or\b)[A-Za-z]{2,}\W*$")  # Sum: 10; 10, QED
BESIDE = re.compile(  # lines about an answer
    r"\W{0,8}(?:my |the |overall |estimated )*(?:confidence|certainty|difficulty)"
    r"(?: (?:level|score|rating|in [\w ]{1,30}))?\W{0,8}[:=]",
    re.IGNORECASE,
)
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
    answer, end = _first_answer(scope, tagged)
    if answer is None or answer.method in ("bare", "last line"):
        return answer
    after = afterthought(scope, answer.text, end)
    return replace(answer, method=TAKEN_BACK) if after.retracted else replace(answer, other=after.later or answer.other)


def _first_answer(scope: str, tagged: bool) -> tuple[Answer | None, int]:
    """The answer by the first of the marks that there is, and where it ends."""
    box, hashed = boxed(scope), next(reversed(list(HASHES.finditer(scope))), None)
    stated, other = _stated(scope)
    marked_end = last_box_end(scope) if box else hashed.end() if hashed else 0
    if marked_end and stated and stated.begin >= marked_end and replaces(scope, stated):
        return Answer(trim(stated.text), "stated"), stated.end
    said, said_end = (stated.text, stated.end) if stated else (None, 0)
    plain = not said or is_formula(said)
    for method, text, end in (
        ("boxed", box, marked_end),
        ("stated", said if tagged and plain else None, said_end),
        ("tag", _one_line(scope) if tagged else None, len(scope)),
        ("hashes", hashed and hashed[1], marked_end),
        ("stated" if plain else "sentence", said, said_end),
        (
            "bare",
            _one_line(scope) if is_formula(scope) and not has_words(scope) and not SAID.search(scope) else None,
            0,
        ),
        ("last line", _last_line(scope), 0),
    ):
        if text and not (method != "boxed" and CUT_OFF_BOX.search(text)):
            trimmed = trim(text)
            if trimmed:
                return Answer(trimmed, method, other if text is said else ""), end
    return None, 0


def _stated(text: str) -> tuple[Statement | None, str]:
    """The last stated answer; and a formula that is stated after it, under a condition."""
    made = statements(text)
    firm = [statement for statement in made if not statement.conditional]
    if not firm or firm[-1] is made[-1]:
        return (made[-1] if made else None), ""
    other = made[-1].text
    return firm[-1], trim(other) if is_formula(other) else ""


def _last_line(text: str) -> str | None:
    """The last line that is not about the answer ("Confidence: 95%")."""
    return next((line for line in reversed(text.splitlines()) if line.strip() and not BESIDE.match(line)), None)


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
    if answer is None and len(text) > 200 and (stated := _stated(text)[0]) and is_formula(stated.text):
        answer = stated.text
    return trim(answer or text)


def _unescaped(text: str) -> str:
    text = repaired(text).replace(r"\\boxed", r"\boxed")
    return text if r"\begin" in text else re.sub(r"\\\\(?=[()%])", r"\\", text)


def _one_line(text: str) -> str | None:
    return text if text and "\n" not in text and len(text) <= 200 else None
