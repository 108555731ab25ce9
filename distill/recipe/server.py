"""`server:` in a recipe or a teacher card: a server, and not the local engine, has the teacher.

Two forms: the address of a running server (`url`), and a server that distill starts and stops (`launch`). They are a
union and not one section with optional fields, so that a key of one form is refused in the other.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, JsonValue, Tag, model_validator

from distill.recipe.price import Price
from distill.section import Free, Section

KEY_VARIABLE = "OPENAI_API_KEY"
SECRET_NAME = re.compile(r"auth|key|token|secret|password|cookie|credential", re.I)
SECRET_VALUE = re.compile(r"\s*((bearer|basic)\s|sk-|hf_)", re.I)
SILENCE = 600.0  # seconds; a request may also wait in the server's queue that long


def variable_name(name: str) -> str:
    """The name of an environment variable. Errors: ValueError for anything else."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # perhaps the key: the message does not repeat it
        raise ValueError("should be the name of an environment variable, such as DEEPSEEK_API_KEY, not the key itself")
    return name


def address_problem(url: str) -> str | None:
    """What is wrong with the address of a server, as the end of a message; None for nothing."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port past 65535
        usable = False
    if "?" in url or "#" in url:
        return "should have no query (?…) or fragment (#…); give a key by server.api_key_env or server.headers"
    if not usable or any(character.isspace() for character in url):
        return "should be an OpenAI-compatible address such as http://localhost:8000/v1"
    return None


def _without_credentials(urls: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for url in (urls,) if isinstance(urls, str) else urls:  # stored and published with the run
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise ValueError("should hold no user or password; give them by `headers` and an environment variable")
        if problem := address_problem(url):
            raise ValueError(problem)
    return urls


def checked_header(name: str, value: str) -> str:
    """A header's value without white space around it. Errors: ValueError, which does not repeat the value, where HTTP
    cannot carry it."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError(f"{name!r} is not the name of a header; use letters, digits and -")
    value = value.strip()
    if not value.isascii() or not value.isprintable():
        raise ValueError(f"{name}: the value holds a line end or a character outside ASCII; remove it")
    return value


def _without_secrets(headers: dict[str, str]) -> dict[str, str]:
    headers = {name: checked_header(name, value) for name, value in headers.items()}
    for name, value in headers.items():
        if not value.startswith("$") and (SECRET_NAME.search(name) or SECRET_VALUE.match(value)):
            raise ValueError(f"{name} looks like a secret; give the name of an environment variable, such as $API_KEY")
    return headers


class TeacherServer(Section):
    """An OpenAI-compatible server that has the teacher: vLLM, SGLang, llama.cpp or an API.

    The address, the key and the concurrency do not decide the traces: a run may move to another server of the same
    model.
    """

    url: Annotated[str | tuple[str, ...], Free, AfterValidator(_without_credentials)] = Field(
        min_length=1,
        description="base address, such as http://localhost:8000/v1; a list of several servers of the same model",
    )
    model: str = Field(min_length=1, description="name of the model on the server")
    api_key_env: Annotated[str, Free, AfterValidator(variable_name)] = Field(
        KEY_VARIABLE,
        description="environment variable with the API key; the key itself is in no file",
    )
    concurrency: Annotated[int | None, Free] = Field(
        None, ge=1, description="requests under way at once; null: `generate.max_batch` or `eval.max_batch`"
    )
    stream: Annotated[bool, Free] = Field(
        True, description="receive tokens as they are sampled, so that a silent server is noticed"
    )
    silence: Annotated[float, Free] = Field(
        SILENCE, gt=0, description="seconds without a token after which a streamed request has failed"
    )
    n: Annotated[bool, Free] = Field(
        False,
        description="ask for all samples of a prompt in one request (`n`), where the server charges the prompt once; "
        "samples then have no seed of their own",
    )
    batch: Annotated[bool, Free] = Field(
        False, description="send all requests as files to the provider's batch API, which answers within a day for less"
    )
    headers: Annotated[dict[str, str], Free, AfterValidator(_without_secrets)] = Field(
        default_factory=dict,
        description="further HTTP headers of every request; a value that begins with $ names an environment variable",
    )
    extra_body: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="further fields of every request, such as `chat_template_kwargs`, as the server documents them",
    )
    price: Annotated[Price | None, Free] = Field(
        None, description="price of the tokens at this server, in place of the card's; null: the card's"
    )


PARALLEL_FLAGS = {"--tensor-parallel-size", "--tp-size", "--tp", "-tp"}
OWN_FLAGS = PARALLEL_FLAGS | {  # flags that distill sets: with other values it could not reach the server
    "--host",
    "--port",
    "--api-key",
    "--served-model-name",
    "--model",
    "--model-path",
    "--config",
}


class LaunchedServer(Section):
    """A vLLM or SGLang server that distill starts with the card's weights on this machine, and stops.

    The engine and its arguments decide the numbers; where it is installed, its GPUs and the concurrency do not.
    """

    launch: Literal["vllm", "sglang"] = Field(description="engine to start")
    executable: Annotated[str | None, Free] = Field(
        None,
        description="the engine's command, or a Python interpreter that has the engine; null: the command `vllm` or "
        "`sglang` on PATH",
    )
    arguments: tuple[str, ...] = Field(
        (), description="further arguments of the server's command, such as `--enforce-eager`"
    )
    tensor_parallel_size: Annotated[int | None, Free] = Field(
        None,
        ge=1,
        description="GPUs that share the weights; null: the largest number, at most all visible GPUs, that divides "
        "the model's attention heads",
    )
    trust_remote_code: bool = Field(False, description="run the Python files in the model directory")
    start_timeout: Annotated[float, Free] = Field(3600, gt=0, description="seconds that the server may take to start")
    concurrency: Annotated[int | None, Free] = Field(
        None, ge=1, description="requests under way at once; null: `generate.max_batch` or `eval.max_batch`"
    )
    silence: Annotated[float, Free] = Field(
        SILENCE, gt=0, description="seconds without a token after which a request has failed"
    )
    extra_body: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="further fields of every request, such as `chat_template_kwargs`, as the server documents them",
    )

    @model_validator(mode="after")
    def sets_no_flag_twice(self) -> "LaunchedServer":
        """Errors: ValueError for an argument that distill sets itself."""
        for argument in self.arguments:
            if (flag := argument.partition("=")[0]) in OWN_FLAGS:
                remedy = "use tensor_parallel_size instead" if flag in PARALLEL_FLAGS else "remove it"
                raise ValueError(f"arguments: {flag} is set by distill; {remedy}")
        return self


def _form(values: object) -> str:
    """The form of a `server:` section, which its key `launch` decides."""
    launched = "launch" in values if isinstance(values, Mapping) else isinstance(values, LaunchedServer)
    return LaunchedServer.__name__ if launched else TeacherServer.__name__


AnyServer = Annotated[
    Annotated[TeacherServer, Tag("TeacherServer")] | Annotated[LaunchedServer, Tag("LaunchedServer")],
    Discriminator(_form),
]
