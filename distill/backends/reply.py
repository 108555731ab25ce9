"""A server's reply to a chat request, checked before anything of it is stored.

A server is not trusted to send what its protocol says: any field may have another type. What cannot be an answer is
`Unreadable`, and the caller asks again; a count that cannot be right (`"seven"`, -1, 10^30) is treated as unknown,
because the answer beside it is complete. Nothing is guessed: a finish reason that is no other name of "stop" is kept,
so that it never counts as one. An answer that the provider withholds (a content filter, or `refusal` in place of a
text) is an answer too, as asking again would pay for the same: its text is empty, and its finish reason says why.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from distill.chat import END_THINK, THINK
from distill.traces.trace import ReasoningForm, form_of, usual_reason

# Finish reasons of answers that were given up: DeepSeek's, vLLM's, OpenRouter's, Z.ai's.
GAVE_UP = ("insufficient_system_resource", "abort", "error", "network_error")
FILTERED, REFUSED = "content_filter", "refusal"  # finish reasons of withheld answers; the second is also the field
MOST_TOKENS = 2**31 - 1  # that a trace can store
LONGEST_REASON = 64  # characters of a finish reason
REASONING: tuple[ReasoningForm, ...] = ("reasoning_content", "reasoning")  # fields of a message
THINKING = "thinking"  # type and field of a part of a message
MESSAGES, STATUSES = ("message", "detail", "status_msg"), ("code", "status_code")  # fields of an error
T = TypeVar("T")
AS_ID = re.compile(r"token_id:(\d{1,10})")  # how vLLM writes a token where ids are requested


class Unreadable(Exception):
    """A reply that holds no answer. The message says why, as the end of a sentence."""


class Empty(Unreadable):
    """An answer without a text and without tokens."""

    def __init__(self) -> None:
        super().__init__("it is empty")


class Reported(Unreadable):
    """An error that came in place of an answer, or in its middle. code: an HTTP status, where there is one."""

    def __init__(self, error: object) -> None:
        about = error if isinstance(error, dict) else {"message": error}
        super().__init__(_first(about, MESSAGES, str) or "it reports an error")
        self.code = _first(about, STATUSES, int)


def reported(reply: Mapping[str, object]) -> Reported | None:
    """The error that a reply without an answer holds, in any of the forms that servers have: `error`, MiniMax's
    `base_resp`, or its fields (`detail`, `code` with `message`) in place of those of an answer."""
    if reply.get("error"):
        return Reported(reply["error"])
    if reply.get("choices"):
        return None
    held = reply.get("base_resp")
    error = held if isinstance(held, dict) else reply
    return Reported(error) if _first(error, MESSAGES, str) and _first(error, STATUSES, int) != 0 else None


def _first(about: Mapping[str, object], names: Iterable[str], kind: type[T]) -> T | None:
    """The first value of these names that has a type, and is not empty."""
    values = (about.get(name) for name in names)
    usable = (value for value in values if isinstance(value, kind) and not isinstance(value, bool))
    return next((value for value in usable if not isinstance(value, str) or value.strip()), None)


@dataclass(frozen=True)
class Reply:
    """One answer. text: with reasoning that the server returns separately put back into `<think>`. finish_reason and
    counts of tokens: None where the server does not say, or nothing that can be right. Token ids and log-probabilities:
    empty and None where they are not there for all tokens. form: as of `Trace`. parts: reasoning and response that came
    in two fields, because the text of either may mention the tags."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    form: ReasoningForm | None = None
    prompt_token_ids: tuple[int, ...] = ()
    completion_token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    parts: tuple[str, str] | None = None


class Counts(NamedTuple):
    """Tokens of a request; None where they are not known."""

    prompt_tokens: int | None
    completion_tokens: int | None


def counts_of(usage: object) -> Counts:
    """The counts in `usage`, as far as they can be right.

    Some providers (xAI) charge for the tokens of reasoning and count them beside `completion_tokens`, not among them:
    `total_tokens` tells, or that there are more of them.
    """
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    total, reasoning = _count(counts.get("total_tokens")), _reasoning_tokens(counts)
    if completion is None:
        return Counts(prompt, None)
    if total is not None and prompt is not None and total - prompt > completion:
        completion = total - prompt
    elif reasoning is not None and reasoning > completion:
        completion += reasoning
    return Counts(prompt, _count(completion))


def read_replies(body: bytes) -> tuple[dict[int, Reply | Unreadable], Counts]:
    """The choices of a chat completion by their index, and the tokens of all; a choice that is no answer does not spoil
    the others.

    Counts of tokens are of all choices together, so a choice has them only where it is alone. Errors: Unreadable.
    """
    reply = as_object(read_json(body), "the reply")
    choices = reply.get("choices")
    if not choices and (error := reported(reply)):
        raise error
    if not isinstance(choices, list) or not choices:
        raise Unreadable("it has no choices")
    replies: dict[int, Reply | Unreadable] = {}
    for number, each in enumerate(choices):
        try:
            choice = as_object(each, "a choice")
            index = choice.get("index")
            place = index if isinstance(index, int) and len(choices) > 1 else number
            replies[place] = _choice(reply, choice, len(choices))
        except Unreadable as error:
            replies[number] = error
    return replies, counts_of(reply.get("usage"))


def read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion. Errors: Unreadable."""
    reply = next(iter(read_replies(body)[0].values()))
    if isinstance(reply, Unreadable):
        raise reply
    return reply


def _choice(reply: Mapping[str, object], choice: Mapping[str, object], choices: int) -> Reply:
    if choice.get("error"):
        raise Reported(choice["error"])
    tokens = Tokens(_ids(reply.get("prompt_token_ids")), _ids(choice.get("token_ids")))
    tokens.add_logprobs(choice.get("logprobs"))
    usage = reply.get("usage") if choices == 1 else shared_usage(reply.get("usage"))
    finish, message = choice.get("finish_reason"), choice.get("message")
    if message is None and finish == FILTERED:
        message = {}
    return reply_of(as_object(message, "a message"), finish, usage, tokens)


def shared_usage(usage: object) -> dict[str, object]:
    """Keep the counts that hold for each of several choices: those of the prompt."""
    counts = usage if isinstance(usage, dict) else {}
    return {name: value for name, value in counts.items() if name.startswith("prompt_")}


class Tokens:
    """Token ids and log-probabilities of an answer, which may come in parts."""

    def __init__(self, prompt: tuple[int, ...] = (), completion: tuple[int, ...] = ()) -> None:
        self.prompt, self.completion = prompt, [*completion]
        self._rows: list[tuple[int, float, tuple[tuple[int, float], ...]]] | None = []
        self._whole = True  # whether every part with text had its ids

    def add(self, chunk: Mapping[str, object], choice: Mapping[str, object]) -> None:
        """Add those of a part of a stream. What a part with text lacks, the answer lacks as a whole."""
        delta, ids = choice.get("delta"), _ids(choice.get("token_ids"))
        has_text = isinstance(delta, dict) and any(delta.get(name) for name in ("content", *REASONING))
        self.prompt = self.prompt or _ids(chunk.get("prompt_token_ids"))
        self.completion += ids
        self._whole = self._whole and (bool(ids) or not has_text)
        rows = len(self._rows or ())
        self.add_logprobs(choice.get("logprobs"))
        if has_text and len(self._rows or ()) == rows:
            self._rows = None

    def add_logprobs(self, value: object) -> None:
        """Add the `logprobs` of a choice. Without ids they say nothing of tokens, and none are kept."""
        content = value.get("content") if isinstance(value, dict) else None
        for entry in content if isinstance(content, list) else ():
            row = _logprob(entry)
            tops = entry.get("top_logprobs") if isinstance(entry, dict) else None
            alternatives = [_logprob(each) for each in tops] if isinstance(tops, list) else []
            if row is None or None in alternatives:
                self._rows = None
            if self._rows is not None and row is not None:
                self._rows.append((*row, tuple(each for each in alternatives if each is not None)))

    def known(
        self, count: int | None = None
    ) -> tuple[tuple[int, ...], tuple[float, ...] | None, tuple[tuple[tuple[int, float], ...], ...] | None]:
        """Completion ids, log-probabilities and alternatives; none where they are not those of all `count` tokens."""
        sent = tuple(self.completion) if self._whole and count in (None, len(self.completion)) else ()
        ids = tuple(token for token, _, _ in self._rows or ())
        if not ids or (sent and sent != ids) or count not in (None, len(ids)):
            return sent, None, None
        return ids, tuple(logprob for _, logprob, _ in self._rows or ()), tuple(tops for _, _, tops in self._rows or ())


def reply_of(message: Mapping[str, object], finish: object, usage: object, tokens: Tokens | None = None) -> Reply:
    """The answer in a message. finish, usage, tokens: what a server sent beside it. Errors: Unreadable."""
    finish_reason = _finish_reason(finish)
    content = _text(message.get("content"), "content")
    texts = {name: _text(message.get(name), name) for name in REASONING}
    texts[REASONING[0]] = texts[REASONING[0]] or _text(thinking_parts(message.get("content")), "thinking")
    form = next((name for name in REASONING if texts[name]), None)
    reasoning = texts[form] if form else ""
    counts = usage if isinstance(usage, dict) else {}
    prompt_tokens, completion_tokens = counts_of(counts)
    refusal = message.get(REFUSED)
    if not (content or reasoning) and isinstance(refusal, str) and refusal and finish_reason != FILTERED:
        finish_reason = REFUSED
    if not (content or reasoning or completion_tokens or finish_reason in (FILTERED, REFUSED)):
        raise Empty
    text = _joined(reasoning, content)
    if form is None:
        form = form_of(content, finish_reason)
    elif not content.strip():
        form = "cut_off" if finish_reason == "length" else "no_content"
    ids, logprobs, top_logprobs = tokens.known(completion_tokens) if tokens else ((), None, None)
    cached_tokens = _count(_detail(counts, "prompt_tokens_details", "cached_tokens", "prompt_cache_hit_tokens"))
    if prompt_tokens is not None and cached_tokens is not None and cached_tokens > prompt_tokens:
        cached_tokens = None  # it is a part of the prompt's
    return Reply(
        text,
        finish_reason,
        prompt_tokens,
        completion_tokens,
        cached_tokens,
        _reasoning_tokens(counts),
        form,
        tokens.prompt if tokens else (),
        ids,
        logprobs,
        top_logprobs,
        _parts(reasoning, content),
    )


def _parts(reasoning: str, content: str) -> tuple[str, str] | None:
    """Reasoning and response of two fields; None where one is empty, or the content has a think block of its own."""
    if not (reasoning and content.strip()) or content.lstrip().startswith(THINK):
        return None
    return reasoning.strip(), content.strip()


def _detail(counts: Mapping[str, object], group: str, name: str, flat: str) -> object:
    """A count inside a group of usage, or under a name of its own, as DeepSeek's API has it."""
    details = counts.get(group)
    value = details.get(name) if isinstance(details, dict) else None
    return counts.get(flat) if value is None else value


def _reasoning_tokens(counts: Mapping[str, object]) -> int | None:
    return _count(_detail(counts, "completion_tokens_details", "reasoning_tokens", "reasoning_tokens"))


def _ids(value: object) -> tuple[int, ...]:
    """Token ids; none where the value is anything else."""
    if not isinstance(value, list) or any(_count(token) is None for token in value):
        return ()
    return tuple(value)


def _logprob(entry: object) -> tuple[int, float] | None:
    """(token id, log-probability) of an entry of `logprobs`; None where it has no id."""
    if not isinstance(entry, dict):
        return None
    token, logprob = entry.get("token_id"), entry.get("logprob")
    if token is None and isinstance(text := entry.get("token"), str) and (match := AS_ID.fullmatch(text)):
        token = int(match[1])
    usable = isinstance(logprob, int | float) and not isinstance(logprob, bool) and math.isfinite(logprob)
    if _count(token) is None or not isinstance(token, int) or not usable or not isinstance(logprob, int | float):
        return None
    return token, float(logprob)


def read_models(body: bytes) -> dict[str, str]:
    """The names in a list of models, and `owned_by`, "" where a server does not say. Errors: Unreadable."""
    reply = read_json(body)
    data = reply if isinstance(reply, list) else as_object(reply, "the reply").get("data")  # Together AI: a bare list
    if not isinstance(data, list):
        raise Unreadable("it lists no models")
    owners = {}
    for item in (as_object(item, "a model") for item in data):
        name, owner = item.get("id"), item.get("owned_by")
        if not isinstance(name, str) or not name:
            raise Unreadable("a model has no name")
        owners[name] = owner if isinstance(owner, str) else ""
    return owners


def read_json(body: bytes) -> object:
    """The value that a body holds. Errors: Unreadable."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable("it is empty" if not body.strip() else "it is not JSON") from None


def as_object(value: object, name: str) -> dict[str, object]:
    """A JSON object. Errors: Unreadable, which calls it `name`."""
    if not isinstance(value, dict):
        raise Unreadable(f"{name} is not an object")
    return value


def thinking_parts(content: object) -> list[object]:
    """The reasoning that a list of parts holds beside its texts, as Mistral's models send it, as a list of parts."""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    found: list[object] = []
    for part in parts:
        if part.get("type") == THINKING:
            inner = part.get(THINKING)
            found += inner if isinstance(inner, list) else [{"type": "text", "text": inner}]
    return found


def joined_parts(value: object, name: str) -> str:
    """A text, the texts of a list of parts without those of reasoning, or "" for null. Errors: Unreadable, which calls
    it `name`."""
    if isinstance(value, list):
        parts = [as_object(part, f"a part of {name}") for part in value]
        parts = [part for part in parts if part.get("type") != THINKING]
        if any(part.get("type") != "text" for part in parts):
            raise Unreadable(f"{name} has a part that is no text")
        value = "".join(joined_parts(part.get("text"), name) for part in parts)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{name} is not text")
    return value


def _text(value: object, name: str) -> str:
    """As `joined_parts`; halves of a surrogate pair are joined, and replaced where one is alone: JSON can spell it,
    UTF-8 cannot store it."""
    return joined_parts(value, name).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _finish_reason(value: object) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > LONGEST_REASON or not value.isprintable():
        raise Unreadable("finish_reason is not a short text")
    reason = usual_reason(value)
    if reason in GAVE_UP:
        raise Unreadable("the server gave up")
    return reason or None


def _count(value: object) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return value if usable and isinstance(value, int) else None


def _joined(reasoning: str, content: str) -> str:
    """The text with both tags: a template may have opened the reasoning in the prompt, and a reasoning parser may have
    taken the tags away."""
    if not reasoning:
        head, closed, _ = content.partition(END_THINK)
        return f"{THINK}\n{content}" if closed and THINK not in head else content
    closed = f"\n</think>\n\n{content.lstrip()}" if content.strip() else ""
    return f"{THINK}\n{reasoning.strip()}{closed}"
