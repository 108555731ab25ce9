"""`server:` in a recipe or a teacher card: the teacher is asked through an address instead of the local engine."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue

from distill.recipe.price import Price
from distill.section import Free, Section

KEY_VARIABLE = "OPENAI_API_KEY"
SILENCE = 600.0  # seconds; a request may also wait in the server's queue that long


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # perhaps the key: the message does not repeat it
        raise ValueError("should be the name of an environment variable, such as DEEPSEEK_API_KEY, not the key itself")
    return name


class TeacherServer(Section):
    """An OpenAI-compatible server that has the teacher: vLLM, SGLang, llama.cpp or an API.

    The address, the key and the concurrency do not decide the traces: a run may move to another server of the same
    model.
    """

    url: Annotated[str | tuple[str, ...], Free] = Field(
        min_length=1,
        description="base address, such as http://localhost:8000/v1; a list of several servers of the same model",
    )
    model: str = Field(min_length=1, description="name of the model on the server")
    api_key_env: Annotated[str, Free, AfterValidator(_variable)] = Field(
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
    headers: Annotated[dict[str, str], Free] = Field(
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
