"""Addresses and API keys. A key never reaches a message: every text that comes from a server or from an HTTP library
passes through here."""

import base64
import binascii
import html
import json
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit

from distill.errors import UserError
from distill.recipe.server import KEY_VARIABLE, SECRET_NAME, SECRET_VALUE, address_problem

HIDDEN = "***"
SCHEMES = ("bearer", "basic", "digest", "token", "apikey", "negotiate")  # of an Authorization header, not secret
SHORTEST = 6  # characters; shorter keys ("none", "x") are placeholders, and would blank out parts of words
PAGE = re.compile(r"<(!doctype|html)\b", re.I)
TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.I | re.S)
MESSAGE_LENGTH = 200  # characters of another program's message that ours repeats


class Secrets:
    """A key, the credentials of an address (`https://user:password@host/v1`), and values of headers, whole and without
    their scheme (`Bearer`): servers repeat the token alone.

    variable: where the key came from.

    Errors: UserError for a key that no HTTP header can carry.
    """

    def __init__(
        self, url: str, key: str | None, variable: str = KEY_VARIABLE, headers: Mapping[str, str] | None = None
    ) -> None:
        self.key, self.variable = (key or "").strip(), variable
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise UserError(f"{variable} holds spaces or characters outside ASCII; set it to the key alone")
        parts = (part for name, value in (headers or {}).items() for part in _parts(name, value))
        secrets = {self.key, *_credentials(url), *parts}
        forms = {form for secret in secrets if len(secret) >= SHORTEST for form in _forms(secret)}
        longest_first = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)

    def hide(self, text: str) -> str:
        """The text without any of the secrets, in whatever form it repeats them."""
        return self._pattern.sub(HIDDEN, text)

    def reason(self, error: BaseException) -> str:
        """What an error says, on one line, without secrets; never empty."""
        return self.line(str(error.__cause__ or error)) or type(error).__name__

    def line(self, text: str) -> str:
        """The beginning of a text of another program, on one line, without secrets; of a page, what it shows."""
        if PAGE.search(text):
            text = html.unescape(TAG.sub(" ", text)).strip() or text
        return self.hide(" ".join(text.split()))[:MESSAGE_LENGTH]


def shown_url(url: str) -> str:
    """An address as messages show it: without credentials and query."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:
        return HIDDEN


def checked_url(url: str) -> str:
    """The address without a slash at its end. Errors: UserError when it is none."""
    if problem := address_problem(url):
        raise UserError(f"{shown_url(url)}: {problem}")
    return url.rstrip("/")


def _credentials(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        return [part for part in (parts.password, parts.username) if part]
    except ValueError:
        return []


def _parts(name: str, value: str) -> Iterator[str]:
    """A header's value and, where it is a secret, its parts without the scheme; of `Basic` also user and password."""
    yield value
    if not (SECRET_NAME.search(name) or SECRET_VALUE.match(value)):
        return
    scheme, *rest = value.split()
    yield from (part for part in (scheme, *rest) if part.lower() not in SCHEMES)
    if scheme.lower() == "basic" and rest:
        try:
            credentials = base64.b64decode(rest[0]).decode()
        except (binascii.Error, UnicodeDecodeError):  # then there is nothing more to hide
            return
        yield from (credentials, *credentials.split(":", 1))


def _forms(secret: str) -> set[str]:
    """A secret as text, percent-encoded, and escaped for JSON and HTML. `Bearer SECRET` contains the first."""
    every = "".join(f"%{byte:02x}" for byte in secret.encode())
    return {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1], html.escape(secret), every}
