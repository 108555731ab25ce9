"""`\\boxed{…}` and `####`: where a text marks its final answer, found in linear time."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{}$\\]+))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_GAP = (
    r"(?:\s|[,;$]|\\[,;:!\s()\[\]]|\\q?quad|\+{2,}|"
    r"(?:\b[a-z]+\s+)?\band\b|\bor\b|\\(?:text|mathrm)\{\s*(?:and|or)\s*\})*"
)
_LABEL = r"(?:[A-Za-z](?:_(?:\w|\{\w+\}))?\s*=\s*[$\s]*)?"  # `x = ` before the next box
BETWEEN_BOXES = re.compile(_GAP + _LABEL)
HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)


def hashes(text: str) -> str | None:
    """What follows the last `####` at the beginning of a line, as in GSM8K."""
    matches: list[str] = HASHES.findall(text)
    return matches[-1] if matches else None


def boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{…}`; boxes separated by commas, "and" or "or" are joined by commas."""
    contents: list[str] = []
    end = 0  # where the previous box ended
    for match in BOX.finditer(text):
        if match.start() < end:
            continue  # a box within a box
        close = match.end() if match[1] else _closing_brace(text, match.end())
        if close is None:
            break  # cut off: so are all boxes inside it
        content = match[1] or text[match.end() : close - 1].strip()
        if not content:
            continue
        if not (contents and match.start() - end <= 80 and BETWEEN_BOXES.fullmatch(text, end, match.start())):
            contents = []
        if content not in contents:
            contents.append(content)
        end = close
    return ", ".join(contents) or None


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
