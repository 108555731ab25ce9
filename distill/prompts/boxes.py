"""`\\boxed{…}` and `####`: where a text marks its final answer, found in linear time."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{}$\\]+))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_GAP = (
    r"(?:\s|[,;$]|\\[,;:!\s()\[\]]|\\q?quad|\+{2,}|"
    r"(?:\b[a-z]+\s+)?\band\b|\bor\b|\\(?:text|mathrm)\{\s*(?:and|or)\s*\})*"
)
_NAME = r"(?:[A-Za-z]|\\(?!boxed|fbox)[A-Za-z]+)(?:_(?:\w|\{\w+\}))?"
BETWEEN_BOXES = re.compile(rf"{_GAP}(?:{_NAME}\s*=\s*[$\s]*)?")  # with `x = ` before the next box
LABEL = re.compile(rf"(?<![A-Za-z\\])({_NAME})\s*=\s*[$\s]*$")
SEPARATED = re.compile(r"(?<!\\)[,;]|\b(?:and|or)\b")
DENIED = re.compile(r"(?:\bnot|n't be|\brather than|\binstead of)[\s$*]*(?:\\[(\[]\s*)?$")
CONSTANTS = {"e", "i", r"\pi"}  # no labels
BEFORE = 40  # characters before a box that are looked at
HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)


def hashes(text: str) -> str | None:
    """What follows the last `####` at the beginning of a line, as in GSM8K."""
    matches: list[str] = HASHES.findall(text)
    return matches[-1] if matches else None


def boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{…}`; boxes separated by commas, "and" or "or" are joined by commas.

    Joined boxes keep their labels: `x = \\boxed{1}, y = \\boxed{2}` is "x = 1, y = 2". A box that only restates another
    one counts once, and "not \\boxed{3}" does not count.
    """
    boxes: list[tuple[str, str]] = []  # labels and contents of the boxes that are joined so far
    end = 0  # where the previous box ended
    for match in BOX.finditer(text):
        if match.start() < end:
            continue  # a box within a box
        close = match.end() if match[1] else _closing_brace(text, match.end())
        if close is None:
            break  # cut off: so are all boxes inside it
        content = match[1] or text[match.end() : close - 1].strip()
        before = text[max(end, match.start() - BEFORE) : match.start()]
        if not content or DENIED.search(before):
            continue
        named = LABEL.search(before)
        box = (named[1] if named else "", content)
        joined = boxes and match.start() - end <= 80 and BETWEEN_BOXES.fullmatch(text, end, match.start())
        restated = len(boxes) > 1 and _bare(content) == ",".join(_bare(each) for _, each in boxes)
        if not joined or restated:
            boxes = [box]
        elif named:
            boxes += [box] if box not in boxes else []
        elif SEPARATED.search(before) or content not in [each for _, each in boxes]:
            boxes.append(box)
        end = close
    if len(boxes) > 1 and all(label and label not in CONSTANTS and "=" not in content for label, content in boxes):
        return ", ".join(f"{label} = {content}" for label, content in boxes)
    return ", ".join(content for _, content in boxes) or None


def _bare(content: str) -> str:
    """A content without brackets and white space: `(1, 2)` restates the boxes 1 and 2."""
    return re.sub(r"\\(?:left|right)|[\s()\[\]{}\\]", "", content)


def last_box_end(text: str) -> int:
    """Index just past the last complete box; 0 where there is none."""
    end = 0
    for match in BOX.finditer(text):
        if match.start() >= end:
            close = match.end() if match[1] else _closing_brace(text, match.end())
            if close is None:
                break
            end = close
    return end


def last_box_start(text: str) -> int | None:
    """Index of the last complete box that is in no other box; None where there is none."""
    start, end = None, 0
    for match in BOX.finditer(text):
        if match.start() >= end:
            close = match.end() if match[1] else _closing_brace(text, match.end())
            if close is None:
                break
            start, end = match.start(), close
    return start


def boxed_end(text: str, start: int) -> int | None:
    """Index just past the `\\boxed{…}` that begins at `start`; None where it is cut off."""
    match = BOX.match(text, start)
    return None if match is None else match.end() if match[1] else _closing_brace(text, match.end())


def _closing_brace(text: str, start: int) -> int | None:
    """Index just past the brace that closes the one before `start`; escaped braces do not count."""
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None
