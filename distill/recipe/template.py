"""Text with names between double braces, `{{question}}`, each of which stands for a text.

There are no conditions and no filters: Jinja would bring both, and a second language into recipes and cards. Braces of
LaTeX and of JSON need no escaping, because a placeholder is a name alone between two pairs of them.
"""

import re
from collections.abc import Callable

PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_][\w.]*)\s*\}\}")


def placeholders(template: str) -> list[str]:
    """The names between double braces, in order of their first occurrence."""
    return list(dict.fromkeys(PLACEHOLDER.findall(template)))


def filled(template: str, text_of: Callable[[str], str]) -> str:
    """The template with each placeholder replaced by `text_of` its name. What is inserted is not searched again."""
    return PLACEHOLDER.sub(lambda match: text_of(match[1]), template)
