"""What a client may ask: the requests of the OpenAI protocol, and ours beside them.

A field that is not read is refused, unless it cannot change the answer: a server that ignores `response_format` or
`logit_bias` gives answers that look right. The fields that the protocol does not have are named as vLLM, SGLang and
llama.cpp name theirs, where they have them.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from distill.prompts.prompt import END_THINK, THINK, Message
from distill.thinking import Thinking

MOST_CHOICES = 256
MOST_IN_ALL = 2048  # choices of a request, of all its prompts
MOST_TOKENS = 2**31 - 1
MOST_STOPS, LONGEST_STOP = 16, 1024  # stop strings, and characters of one
MOST_ALTERNATIVES = 1024  # log-probabilities of one token


class BadRequest(Exception):
    """A request that is refused. param: the field at fault. code: as OpenAI's error codes."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else [] if value is None else value


def _is_default(name: str, value: object) -> bool:
    """Whether a parameter that is not supported has a value that changes nothing."""
    return value in DEFAULTS[name]


DEFAULTS: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
EMPTY_IN_MESSAGES = {  # fields of a message that are null or empty, or refused
    "annotations",
    "audio",
    "function_call",
    "name",
    "refusal",
    "tool_calls",
}
REASONING = ("reasoning_content", "reasoning")  # fields of an answer that is sent back, one of which is read
IGNORED = {  # they do not change the answer
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # of OpenAI's service; there is none


class TemplateArguments(BaseModel):
    """`chat_template_kwargs`: the template's mode, by either of its names, and its level (`distill.thinking`)."""

    model_config = ConfigDict(extra="forbid")

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["high", "max"] | None = None

    @property
    def mode(self) -> Thinking | None:
        """Whether the model thinks before it answers, and at which level; None leaves it to the template."""
        thinks = self.enable_thinking if self.thinking is None else self.thinking
        return thinks if thinks is False or self.reasoning_effort is None else self.reasoning_effort


class _Sampled(BaseModel):
    """The fields of both endpoints.

    prompt_key: up to 16 hex digits that, with seed and sample, decide the random draws; default: the prompt's own.
    sample: number of the first choice's sample. return_token_ids: whether the answer has the ids of prompt and choices.
    ignore_eos: whether it goes on to the token limit, for measurements.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, le=MOST_TOKENS)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
        BeforeValidator(_as_list),
        Field(max_length=MOST_STOPS),
    ] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    prompt_key: str | None = Field(None, pattern="^[0-9a-f]{1,16}$")
    sample: int = Field(0, ge=0, lt=2**31 - MOST_CHOICES)
    return_token_ids: bool | None = False
    ignore_eos: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for name in DEFAULTS.keys() & values.keys():
            if not _is_default(name, values[name]):
                raise ValueError(f"{name} is not supported; leave it out")
        return {name: value for name, value in values.items() if name not in DEFAULTS and name not in IGNORED}


def _joined(content: object) -> object:
    """The text of parts. Errors: ValueError for parts that are not text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError("only parts of type text are supported")
    return "".join(str(text) for text in texts)


class ChatMessage(BaseModel):
    """One turn. A developer's message is a system's. content: text, or a list of parts of text. An answer may be sent
    back as it came: its reasoning goes before the content as a think block, which most templates leave out. Its other
    fields are accepted where they are empty: the template would not show them."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for name in EMPTY_IN_MESSAGES & values.keys():
            if values[name]:
                raise ValueError(f"{name} of a message is not supported; leave it out")
        kept = {name: value for name, value in values.items() if name not in {*EMPTY_IN_MESSAGES, *REASONING}}
        reasoning = next((value for name in REASONING if (value := values.get(name))), None)
        if reasoning is None:
            return kept
        if not isinstance(reasoning, str) or values.get("role") != "assistant":
            raise ValueError("the reasoning of a message is text, and the assistant's; leave it out of others")
        return kept | {"content": f"{THINK}\n{reasoning}\n{END_THINK}\n\n{_joined(kept.get('content') or '')}"}

    def to_message(self) -> Message:
        """The turn as templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`. separate_reasoning: whether the think block is in `reasoning_content`; else it stays
    in the content, with its tags. thinking_budget: tokens after which an open think block is closed."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    chat_template_kwargs: TemplateArguments | None = None
    separate_reasoning: bool | None = True
    thinking_budget: int | None = Field(None, ge=1, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last one is the assistant's; end with the user's")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        """Completion tokens at most; None: what the context leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities wanted beside that of each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampled):
    """`POST /v1/completions`. prompt: text, token ids, or several of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=MOST_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids. Errors: BadRequest when there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise BadRequest("prompt is empty", "prompt")
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        if len(self.prompt) * (self.n or 1) > MOST_IN_ALL:
            raise BadRequest(f"prompt: {MOST_IN_ALL:,} choices of a request at most, of all prompts together", "prompt")
        return [prompt for prompt in self.prompt if isinstance(prompt, str | list)]

    @property
    def limit(self) -> int | None:
        """Completion tokens at most; None: what the context leaves."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """As `ChatRequest.alternatives`."""
        return self.logprobs


def parse_chat(body: bytes) -> ChatRequest:
    """A chat request from JSON. Errors: BadRequest."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _bad(error) from None


def parse_completion(body: bytes) -> CompletionRequest:
    """A completion request from JSON. Errors: BadRequest."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _bad(error) from None


def _bad(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not place and (named := message.partition(" ")[0].rstrip(":")) in {*DEFAULTS, *ChatRequest.model_fields}:
        return BadRequest(message, named, "unsupported_parameter")
    if first["type"] == "extra_forbidden":
        return BadRequest(f"{place}: unknown parameter", place, "unknown_parameter")
    return BadRequest(f"{place}: {message}" if place else message, place or None)


def template_mode(request: ChatRequest) -> Thinking | None:
    """The template's mode that a request chooses."""
    return request.chat_template_kwargs.mode if request.chat_template_kwargs else None


Object = dict[str, JsonValue]
