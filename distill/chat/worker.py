"""The process that renders chat templates: `python -m distill.chat.worker SECONDS MEMORY CHARACTERS`.

Reads requests (`distill.chat.frames`) from stdin and answers each, until stdin ends. A template is compiled in the
environment of `transformers.apply_chat_template`, rebuilt here because importing transformers takes seconds; a test
compares the two. One difference: `strftime_now` is a fixed day (`loading.TODAY`). The limits are the kernel's: address
space by RLIMIT_AS, processor time by an interval timer whose signal ends the process. A template that exceeds one
cannot catch it.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from distill.chat.frames import receive, send
from distill.chat.loading import TODAY


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what an assistant says: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own annotation is a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block into a scope around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class TemplateDict:
    """`dict` of a template: makes dictionaries, has no attributes to reach Python's internals by."""

    def __call__(self, *args: object, **kwargs: object) -> dict[object, object]:
        """Make a dictionary."""
        made: dict[object, object] = {}
        made.update(*args, **kwargs)
        return made

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        """Make a dictionary of keys with one value."""
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """`namespace` of a template. Names that begin with an underscore are refused, as transformers does."""

    def __init__(*args: object, **kwargs: object) -> None:
        itself, *values = args  # a template may pass `self=`
        attributes = TemplateDict()(*values, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(itself, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.fromisoformat(TODAY).strftime(form)


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """Compile a template as transformers does. Errors: whatever Jinja raises."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment.from_string(source)


def literals(source: str) -> list[str]:
    """The texts that a template can write by itself: outside its tags, and its string constants."""
    tree = compiled(source).environment.parse(source)
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    constants = (node.value for node in tree.find_all(nodes.Const))
    return sorted(texts | {value for value in constants if isinstance(value, str)})


def described(error: Exception) -> str:
    """One line for an error inside a template."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    if isinstance(error, jinja2.TemplateError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}"


def answer(request: dict[str, object], seconds: float, characters: int) -> dict[str, object]:
    """The reply to a request: the texts, or the error and the number of the conversation it happened in."""
    source, texts = str(request["template"]), list[str]()
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        if "chats" not in request:
            return {"texts": literals(source)}
        template = compiled(source)
        variables, chats = request["variables"], request["chats"]
        assert isinstance(variables, dict) and isinstance(chats, list)
        for messages, add_generation_prompt in chats:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            given = {"messages": messages, "tools": None, "documents": None}
            text = template.render(given | {"add_generation_prompt": add_generation_prompt} | variables)
            if len(text) > characters:
                raise jinja2.TemplateError(f"it renders {len(text):,} characters; at most {characters:,} are read")
            texts.append(text)
        return {"texts": texts}
    except Exception as error:  # a template is untrusted code: whatever it raises is its own failure
        return {"error": described(error), "number": len(texts)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(seconds: float, memory: int, characters: int) -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted parent closes stdin
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (request := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, answer(request, seconds, characters))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
