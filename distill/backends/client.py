"""The HTTP client of an address: proxies and certificates of the environment, no limit of connections.

How many requests are under way is decided by `pacing`; a second limit inside the client would make the others wait for
a connection until they time out. A server on this machine is asked without the proxies of the environment, which lead
elsewhere, and which the client may not know.
"""

import os
import resource
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2

from distill.backends.bounds import bound
from distill.errors import UserError

if TYPE_CHECKING:
    from openai import DefaultAsyncHttpxClient

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SPARE_FILES = 512  # that this process opens beside its connections


def new_client(where: str, url: str, direct: bool, most: int, each: int) -> "DefaultAsyncHttpxClient":
    """A client for an address. where: the address as messages show it. direct: without proxies. most, each: as of
    `bound`. Errors: UserError for a proxy or certificates of the environment that cannot be used."""
    import openai

    try:
        return openai.DefaultAsyncHttpxClient(
            event_hooks={"response": [partial(bound, most=most, each=each)]},
            follow_redirects=False,
            trust_env=not (direct or _is_plain_loopback(url)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )
    except (ImportError, ValueError) as error:
        if not (variable := _unknown_proxy()):
            raise
        scheme = _scheme(os.environ[variable])
        install = ", or install the package socksio" if scheme in ("socks5", "socks5h") else ""
        raise UserError(
            f"{where}: the environment variable {variable} names a proxy of type {scheme}, which cannot be used here; "
            f"unset it, or set it to an http:// proxy{install}"
        ) from error
    except OSError as error:
        if not (variable := next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)):
            raise
        raise UserError(
            f"{where}: {variable} is {os.environ[variable]}, where no certificates can be read "
            f"({error.strerror or error}); correct the variable, or unset it"
        ) from error


def allow_connections(count: int) -> None:
    """Raise this process's limit of open files, as far as it may, for so many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(ValueError, OSError):  # then some of the requests fail, and are sent again
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _unknown_proxy() -> str | None:
    """The environment variable whose proxy is not reached by HTTP."""
    kinds = {name: _scheme(value) for name, value in os.environ.items() if name.lower() in PROXIES}
    return next((name for name, scheme in kinds.items() if scheme not in ("", "http", "https")), None)


def _scheme(proxy: str) -> str:
    """The scheme of a proxy's address, "" where it has none and is taken for http."""
    scheme, separator, _ = proxy.partition("://")
    return scheme.lower() if separator else ""


def _is_plain_loopback(url: str) -> bool:
    """Whether an address is on this machine and needs no certificates."""
    parts = urlsplit(url)
    with suppress(ValueError):
        return parts.scheme == "http" and ip_address(parts.hostname or "").is_loopback
    return parts.scheme == "http" and parts.hostname == "localhost"
