"""Is this the right letter? The final answer of a question with choices.

A mark counts where it names exactly one choice: `\\boxed{B}`, "Answer: (b)", `B) 4 mol`, "Option D", "B, because".
The last such mark is the answer, so an equation in a box before "The answer is (A)" does not hide it. A mark that names
several choices ("A or C"), or only may name one (the article in "A stable cation", the pronoun in "I cannot tell"), is
unverifiable. A question ("The answer is A?") and a statement about wrong choices ("Incorrect answers: A) …") are no
marks. A statement with a condition ("the answer is A) only if …"), of what seems so, or about an option that is not
called the right one ("the option is A"), counts where there is no other mark; so does "Option B is correct" where no
other option is called so. A mark that is taken back ("Answer: A. Wait, it is B") is unverifiable, and a name that
starts like a letter ("E. coli", "D, L-isomers") names none. Where the gold answer lists letters, the same letters are
right.

Models pad and repeat: white space is collapsed before anything is searched, and of the statements the last `STATEMENTS`
count, each with `LONGEST` characters, so that the time is linear in the length of a response.
"""

import re
from collections import deque
from dataclasses import replace
from typing import NamedTuple

from distill.grading.grade import TAKEN_BACK, Answer, Ruling, TaskGrader
from distill.grading.math import FONT, gold_answer
from distill.grading.math.extraction import scope_of
from distill.grading.math.statements import BEFORE, LINK, RETRACTED, TURN, denied
from distill.prompts.boxes import boxed, last_box_end

LONGEST, STATEMENTS = 400, 64
NAMED = r"(?:(?:the )?(?:option|choice|answer) ?:? ?|(?:答案|选项|选择|选) ?[是为]? ?[:\uff1a]? ?)?"
WHOLE = re.compile(rf"{NAMED}[\[({{]? ?([A-J]) ?[\])}}]? ?[.:,。\uff0e]?", re.IGNORECASE)
BACK = (  # not after a letter: it is taken back
    r"(?! ?(?i:wait|oops|actually|hmm|correction|sorry|scratch that|hold on|not (?:this|that) one|"
    r"not (?:the )?(?:right|correct))\b)"
)
HEDGE = (  # after a letter: another one may follow
    BACK + r"(?! ?(?:or|and|maybe|perhaps|possibly|或|but\b.{0,40}\b(?:actually|really|it is|it's|is possible))\b)"
    r"(?! ?\( ?[A-J] ?\))(?! ?(?:[K-Z](?![\w-])|[DL]-|[IVX]{2,}\b))"
)
SPECIES = (  # genera are abbreviated to a letter
    "coli|cloacae|faecalis|histolytica|elegans|difficile|botulinum|perfringens|tetani|diphtheriae|albicans|jejuni|"
    "trachomatis|familiaris|pylori|influenzae|sapiens|erectus|habilis|neanderthalensis|subtilis|anthracis|cereus|"
    "burgdorferi|fragilis|thaliana|fumigatus|aegypti|gambiae|baumannii|afarensis|africanus|melanogaster|rerio|discoideum|"
    "radiodurans|lamblia|gallus"
)
SPECIES_NAME = re.compile(rf"[^\w\n]{{0,3}}[A-J]\. ?(?:{SPECIES})\b")
NAME = rf"(?!{SPECIES_NAME.pattern})"
HEAD = re.compile(
    rf"(?i:{NAMED}){NAME}(?:[\[(] ?([A-Ja-j]) ?[\])]{HEDGE} ?\S.*"  # (B) 4 mol
    rf"|([A-J])(?: ?[).:](?!\w){BACK}| ?[,\uff0c、。)\uff09\uff1a]{HEDGE}"  # B) 4 mol, B: 4 mol
    rf"| [-–—] {HEDGE}(?=\w\w|\d[\d.,]* \w\w)| \({HEDGE}| (?=(?:because|since|due to|which|only(?! (?:if|when)))\b)).+)"
)
SEVERAL = re.compile(r"\(?\b[A-J]\b\)?\s*(?:[,、/&+]|\bor\b|\band\b|[或和])\s*(?:and\s+|or\s+)?\(?\b[A-J]\b\)?")
LETTERS_ONLY = re.compile(r"[({\[]? ?[A-J](?: ?(?:[,\u3001;&]|,? ?\band\b) ?[A-J])+ ?[)}\]]?")
OPENING = re.compile(rf"(?i:{NAMED})[\[{{]?")
STATED = re.compile(
    r"\b(?P<what>answers?|choice|option)[\x22'*_]*"
    r"(?:\s+(?:is|are|would be|must be|should be)\b[*_]*[\s:]*|\s*[:=]\**\s*)"
    r"|(?P<chinese>答案|正确的?选项|[故应]选)[*_]*[是为选择]*\s*[:\uff1a]?\s*",
    re.IGNORECASE,
)
CHOSEN = re.compile(
    r"(?:I\s+(?:think|would\s+choose|choose|pick|would\s+say|believe)\s+(?:it\s+is|it's|that\s+it\s+is)?\s*)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"\n|(?<=[\w)*])[.!?]\**(?=\s|$)|。")
PREFERRED = re.compile(r"\b(?:correct|right|best|final|my|chosen)\W+$", re.IGNORECASE)
SEEMING = re.compile(r"\b(?:seems?|appears?|at first)\b[^.!?\n]*$", re.IGNORECASE)
CALLED = re.compile(  # Option B is correct. I choose B.
    r"\b(?:(?:(?i:option|choice|answer) \W{0,3}([A-J])|([B-HJ]))\b\W{0,3} (?:is|must be|would be) "
    r"(?:the |therefore |thus )?(?:correct|right|best)(?: (?:answer|option|choice|one))?"
    r"|I(?: will| would|['\u2019]ll)? (?:choose|pick|select|go with) (?:(?i:option|choice|answer) )?\W{0,3}([A-J])\b)"
    r"[*_)\]\"]{0,3}(?= ?(?:[.!\n]|$|,? ?(?:because|since)\b))"
)
CORRECTED = re.compile(  # Wait, it should be B. Actually, B is correct. Correction: B
    rf"(?:^|[.!?,;:\n\u2014\u2013-])\W{{0,8}}(?:{LINK}\W{{1,4}})?{TURN}\b[^.!?\n]{{0,60}}?(?:"
    r"\b(?:is|be|it['\u2019]s|option|choice|answer|pick|choose) ?:? ?\W{0,3}([A-J])\b"
    r"(?!\W{0,3} (?:is )?(?:wrong|incorrect|not|too|[a-z]+ing)\b)"
    r"|[ \n:,]\W{0,3}([A-J])\b\W{0,3}?"
    r"(?=$|[.!\n]| instead\b| is (?:actually )?(?:the )?(?:correct|right|best|answer)\b))",
    re.IGNORECASE,
)
LABELS = re.compile(r"\b[A-J] ?[:\uff1a)]")  # A: no. B: yes.
CONDITION = re.compile(r"\W*[A-Ja-j]\b\W*(?:(?:only )?(?:if|when|unless|assuming|provided)|only (?:in|for|under))\b")


class ChoiceGrader(TaskGrader):
    """Compares letters; needs no parser."""

    version = 4  # marks that are taken back; options called correct; names that begin like a letter

    def gold(self, text: str) -> str:
        """The gold letter, as a data set gives it; the text where it names none."""
        answer = gold_answer(text)
        if named := letter(answer):
            return named
        marked = self.find(text)
        return (marked and marked.marked and letter(marked.text)) or answer

    def find(self, response: str) -> Answer | None:
        """The last mark that names one choice, else the last mark, else the last line."""
        scope, tagged = scope_of(response)
        scope = _collapsed(scope)
        if not scope:
            return None
        marks = _marks(scope, tagged)
        for mark in reversed(marks):
            if named := letter(mark.answer.text):
                return replace(mark.answer, method=TAKEN_BACK) if _taken_back(scope, mark, named) else mark.answer
            if SEVERAL.search(_plain(mark.answer.text)):
                return mark.answer
        if called := _called(scope):
            return Answer(called, "stated")
        return marks[-1].answer if marks else Answer(scope.splitlines()[-1].strip(), "last line")

    def shown(self, answer: Answer) -> str:
        """The letter, so that votes count letters; the text where it names none or several."""
        return letter(answer.text) or answer.text

    def rule(self, gold: str, answer: Answer) -> Ruling:
        """Compare two letters."""
        return judge_choice(gold, answer)

    def reads_plainly(self, gold: str) -> bool:
        """Whether the gold answer is a letter."""
        return re.fullmatch("[A-J]", gold.strip().upper()) is not None


class _Mark(NamedTuple):
    """A marked answer, in the order in which marks count: a firm one after those that are not, a later one after an
    earlier one. place, end: where its text begins and ends."""

    firm: bool
    place: int
    answer: Answer
    end: int


def _marks(scope: str, tagged: bool) -> list[_Mark]:
    """The marked answers of a response, the one that counts most at the end."""
    marks = [_Mark(True, 0, Answer(scope, "tag"), len(scope))] if tagged and len(scope) <= 200 else []
    if (box := boxed(scope)) is not None:
        end = last_box_end(scope)
        marks.append(_Mark(True, end, Answer(box, "boxed"), end))
    for match in deque(STATED.finditer(scope), STATEMENTS):
        text = SENTENCE_END.split(scope[match.end() : match.end() + LONGEST], maxsplit=1)[0]
        before = scope[max(0, match.start() - BEFORE) : match.start()]
        end = match.end() + len(text)
        asked = scope.startswith("?", end)
        if (
            not text
            or asked
            or r"\boxed" in text
            or SPECIES_NAME.match(scope, match.end())
            or denied(scope, match.start())
        ):
            continue
        text = CHOSEN.sub("", text, count=1).strip()
        called_right = match["what"] is None or match["what"].lower().startswith("answer") or PREFERRED.search(before)
        doubted = SEEMING.search(before) or CONDITION.match(_plain(text))
        firm = bool(called_right) and not doubted
        marks.append(_Mark(firm, match.end(), Answer(text, "stated"), end))
    if not marks and len(scope) <= 200 and "\n" not in scope and letter(scope) and len(LABELS.findall(scope)) < 2:
        marks.append(_Mark(True, 0, Answer(scope, "bare"), len(scope)))
    return sorted(marks, key=lambda mark: mark[:2])


def _taken_back(scope: str, mark: _Mark, named: str) -> bool:
    """Whether the response says after a mark that it is wrong, or another letter is right."""
    others = (next(group for group in match.groups() if group) for match in CORRECTED.finditer(scope, mark.place))
    return any(other.upper() != named for other in others) or RETRACTED.search(scope[mark.end :]) is not None


def _called(scope: str) -> str | None:
    """The only letter that a response without marks calls correct."""
    letters = {
        next(group for group in match.groups() if group)
        for match in CALLED.finditer(scope)
        if not denied(scope, match.start())
    }
    return letters.pop() if len(letters) == 1 else None


def _collapsed(text: str) -> str:
    """The text with a space for each run of them, and without empty lines."""
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def _plain(text: str) -> str:
    """The beginning of a text without fonts, delimiters and Markdown, with single spaces."""
    text = " ".join(text[: 4 * LONGEST].split())[:LONGEST]
    for _ in range(3):
        text = FONT.sub(r"\1", text)
    return " ".join(re.sub(r"\\[()\[\],;: ]|\\(?:left|right)|[\\$*\"`]", " ", text).split())


def letter(text: str) -> str | None:
    """The choice that an answer names, as in `(B)`, `\\text{b}`, "Option B" or `B) 4 mol`; None for none or several."""
    plain = _plain(text)
    opening = OPENING.match(plain)
    if opening and SEVERAL.match(plain, opening.end()):
        return None
    match = WHOLE.fullmatch(plain) or HEAD.fullmatch(plain)
    return next(group for group in match.groups() if group).upper() if match else None


def _letters(text: str) -> set[str]:
    """The letters of a text that lists several; none for any other text."""
    plain = _plain(text)
    return set(re.findall(r"\b[A-J]\b", plain)) if LETTERS_ONLY.fullmatch(plain) else set()


def judge_choice(gold: str, answer: Answer) -> Ruling:
    """Compare an answer with the gold letter. An answer that is not marked as one can only be right, and no answer is
    wrong where the gold answer is no letter."""
    if answer.method == TAKEN_BACK:
        return "unverifiable", TAKEN_BACK
    given, wanted = letter(answer.text), gold.strip().upper()
    if not re.fullmatch("[A-J]", wanted):
        if answer.marked and _plain(answer.text).casefold() == _plain(gold).casefold():
            return "correct", "same text"
        same = answer.marked and (listed := _letters(gold)) and listed == _letters(answer.text)
        return ("correct", "same letters") if same else ("unverifiable", "gold is no letter")
    if given == wanted:
        return "correct", "same letter"
    if not answer.marked:
        return "unverifiable", "no marked answer"
    if given:
        return "wrong", "another letter"
    return "unverifiable", "several letters" if SEVERAL.search(_plain(answer.text)) else "not a letter"
