"""Texts for the page: a model's text, escaped, with its formulas as MathML, which browsers draw themselves.

A formula is the text inside `$$…$$`, `\\[…\\]`, `\\(…\\)` or `$…$`, and a bare `\\boxed{…}`. A dollar sign is money
unless it opens directly before and closes directly after something that looks like mathematics. A formula that the
converter cannot read, or that has no end, stays text: a report must survive everything that a model writes.
"""

import re
from functools import lru_cache

from markupsafe import Markup, escape

from distill.prompts.boxes import boxed_end

LONGEST = 1000  # characters of a formula
FORMULA = re.compile(
    r"\$\$(?P<display>.{1,1000}?)\$\$|\\\[(?P<bracket>.{1,1000}?)\\\]|\\\((?P<inline>.{1,1000}?)\\\)"
    r"|(?<![\\$\w])\$(?P<dollar>[^\s$](?:[^$\n]{0,300}?[^\s$\\])?)\$(?![\d$])|(?P<box>\\boxed\{)",
    re.DOTALL,
)
LIKE_MATHEMATICS = re.compile(r"[\\^_={}<>+*/]|^[-\d.,]+$|^[A-Za-z]{1,2}$|^[A-Za-z]\(")

ALIGNED = re.compile(r"\\(begin|end)\{(?:aligned|align\*?|gathered|gather\*?|split|eqnarray\*?)\}")
ATTRIBUTES = (
    "xmlns|display|mathvariant|stretchy|fence|form|[lr]space|width|height|depth|voffset|notation|linethickness|linebreak|"
    "(?:row|column)(?:align|spacing|lines)|frame|displaystyle|scriptlevel|accent(?:under)?|m(?:ax|in)size|symmetric"
)
TAG = re.compile(rf'</?m[a-z]+(?: (?:{ATTRIBUTES})="[^"<>]*")*\s*/?>')


def marked_up(text: str) -> Markup:
    """Convert a text to HTML. Everything but the formulas is escaped."""
    parts: list[Markup] = []
    at = 0
    for match in FORMULA.finditer(text):
        if match.start() < at:
            continue
        end, latex = match.end(), next(group for group in match.groups() if group is not None)
        if match["box"]:
            close = boxed_end(text, match.start())
            if close is None or close - match.start() > LONGEST:
                continue
            end, latex = close, text[match.start() : close]
        elif match["dollar"] and not LIKE_MATHEMATICS.search(latex):
            continue
        drawn = mathml(latex, match["display"] is not None or match["bracket"] is not None)
        if drawn is not None:
            parts += [escape(text[at : match.start()]), drawn]
            at = end
    return Markup("").join([*parts, escape(text[at:])])


@lru_cache(4096)
def mathml(latex: str, display: bool) -> Markup | None:
    """Convert a formula; None where that fails, or the result is not MathML alone: the converter escapes no text."""
    from latex2mathml.converter import convert

    plain = re.sub(r"\\(?:tag|label)\{[^{}]*\}", "", latex.strip())
    plain = ALIGNED.sub(r"\\\1{matrix}", plain).replace("<", r"\lt ").replace(">", r"\gt ")
    try:
        converted: str = convert(plain, display="block" if display else "inline")
    except Exception:  # the converter raises all kinds on a model's text; the text itself is shown
        return None
    return Markup(converted) if all(TAG.fullmatch(tag) for tag in re.findall(r"<[^>]*>?", converted)) else None
