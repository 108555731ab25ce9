"""Words of a text, for filters that compare texts: what stands between white space, and single characters of the
scripts that are written without spaces (Thai to Khmer, Japanese, Chinese)."""

import re
import unicodedata

UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
ANY_UNSPACED = re.compile(UNSPACED)
FENCE = r"^[ \t]*(```+(?=[^`\n]*$)|~~~+)"  # opens a block of code, with MULTILINE; the same closes it
WORD = re.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})\S)+")


def composed(text: str) -> str:
    """The text with composed accents (NFC), in which equal texts have equal characters."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return text.split() if text.isascii() or not ANY_UNSPACED.search(text) else WORD.findall(text)
