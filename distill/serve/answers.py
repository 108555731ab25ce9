"""One request, from its body to its answer: whole, or as server-sent events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from distill.backends import SamplingParams
from distill.backends.live import Asked, LiveModel, with_tokens
from distill.chat import Chat
from distill.errors import UserError
from distill.prompts.prompt import content_hash
from distill.serve.choices import Delta, TokenTexts, deltas
from distill.serve.requests import BadRequest, ChatRequest, CompletionRequest, Object, template_mode
from distill.thinking import Thinking

Request = ChatRequest | CompletionRequest
T = TypeVar("T")


@dataclass
class Work:
    """A request as the engine gets it. asked: one for each prompt, whose choices follow one another."""

    request: Request
    chat: Chat
    asked: list[Asked]
    prefill: str = ""
    separate: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def samples(self) -> int:
        """Choices of all prompts."""
        return sum(len(asked.samples) for asked in self.asked)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(asked.prompt_ids) for asked in self.asked)


class Answers:
    """Answers requests with one model. name: what clients call it."""

    def __init__(self, live: LiveModel, name: str) -> None:
        self.live, self.name = live, name
        self._texts = TokenTexts(live.chat)
        self._chats: dict[Thinking | None, Chat] = {live.model.thinking: live.chat}

    # ---- what the engine gets

    def prepare(self, request: Request) -> Work:
        """Tokenize the prompts and check the lengths. Takes time, so it is called in a thread. Errors: BadRequest."""
        if request.model not in (None, self.name):
            raise BadRequest(f"no model {request.model!r}; the model is {self.name}", "model", "model_not_found", 404)
        if isinstance(request, CompletionRequest):
            chat = self.live.chat
            return Work(request, chat, [self._asked(request, chat, ids) for ids in self._ids(request)])
        chat, messages = self._chat(template_mode(request)), [message.to_message() for message in request.messages]
        try:
            ids = chat.prompt_ids(messages)
        except UserError as error:
            raise BadRequest(str(error), "messages") from error
        asked = self._asked(request, chat, ids, content_hash(tuple(messages), "chat", None))
        return Work(request, chat, [asked], chat.prefill, request.separate_reasoning is not False)

    def _chat(self, mode: Thinking | None) -> Chat:
        mode = self.live.model.thinking if mode is None else mode
        if mode not in self._chats:
            try:
                self._chats[mode] = Chat.load(self.live.model.directory, self.live.model.template, mode)
            except UserError as error:
                lacks = "has no levels of thinking; send no" if isinstance(mode, str) else "has one mode only; send no"
                fields = "`reasoning_effort`" if isinstance(mode, str) else "`thinking` and no `reasoning_effort`"
                raise BadRequest(f"the model's chat template {lacks} {fields}", "chat_template_kwargs") from error
        return self._chats[mode]

    def _ids(self, request: CompletionRequest) -> list[list[int]]:
        tokenizer, all_ids = self.live.chat.tokenizer, []
        for prompt in request.prompts:
            ids = prompt if isinstance(prompt, list) else list(tokenizer(prompt, verbose=False)["input_ids"])
            if not ids or min(ids) < 0 or max(ids) >= self.live.vocab_size:
                raise BadRequest(
                    f"prompt: expected at least one token, with an id from 0 to {self.live.vocab_size - 1:,}", "prompt"
                )
            all_ids.append(ids)
        return all_ids

    def _asked(self, request: Request, chat: Chat, ids: list[int], key: str | None = None) -> Asked:
        room = self.live.max_context - len(ids)
        limit = room if request.limit is None else request.limit
        if limit > room or room < 1:
            raise BadRequest(
                f"the prompt has {len(ids):,} tokens and max_tokens is {limit:,}, together more than the context of "
                f"{self.live.max_context:,}",
                "messages" if isinstance(request, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        sampling = SamplingParams(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            max_new_tokens=limit,
            logprobs=request.alternatives or None,
            thinking_budget=request.thinking_budget if isinstance(request, ChatRequest) else None,
        )
        try:
            sampling = with_tokens(sampling, chat)
        except UserError as error:
            raise BadRequest(str(error), "thinking_budget") from error
        if request.ignore_eos:
            sampling = replace(sampling, stop_token_ids=())
        key = request.prompt_key or key or content_hash(({"role": "user", "content": json.dumps(ids)},), "chat", None)
        seed = secrets.randbits(63) if request.seed is None else request.seed  # each prompt's own: it may be repeated
        samples = tuple(range(request.sample, request.sample + (request.n or 1)))
        streamed = bool(request.stream or request.stop)
        return Asked(tuple(ids), sampling, seed, int(key, 16), samples, streamed)

    # ---- what the client gets

    async def deltas(self, work: Work) -> AsyncGenerator[tuple[int, Delta], None]:
        """(index of a choice, delta) of all prompts, as they come. Errors: Rejected; Broken."""
        sources, begin = [], 0
        for asked in work.asked:
            after = asked.prompt_ids if isinstance(work.request, CompletionRequest) else ()
            source = deltas(self.live, work.chat, asked, work.request.stop, work.prefill, work.separate, after)
            sources.append(_numbered(source, begin))
            begin += len(asked.samples)
        async with aclosing(merged(sources)) as each:
            async for pair in each:
                yield pair

    async def whole(self, work: Work) -> tuple[Object, list[Delta]]:
        """The answer as one object, and its choices. Errors: Rejected; Broken."""
        choices = [Delta() for _ in range(work.samples)]
        async with aclosing(self.deltas(work)) as source:
            async for index, delta in source:
                choices[index].add(delta)
        answer = self._head(work, "") | {
            "choices": [self._choice(work, index, choice) for index, choice in enumerate(choices)],
            "usage": self.usage(work, sum(len(choice.token_ids) for choice in choices)),
        }
        if work.request.return_token_ids and isinstance(work.request, ChatRequest):
            answer["prompt_token_ids"] = list(work.asked[0].prompt_ids)
        return answer, choices

    async def events(self, work: Work) -> AsyncGenerator[tuple[bytes, Delta | None], None]:
        """(a server-sent event, the delta in it) until the answer is complete. Errors: Rejected; Broken."""
        chat = isinstance(work.request, ChatRequest)
        head, begun, characters, tokens = self._head(work, ".chunk" if chat else ""), set[int](), dict[int, int](), 0
        options = work.request.stream_options
        usage = options is not None and options.include_usage
        tokens_wanted = work.request.return_token_ids or work.request.alternatives is not None
        async with aclosing(self.deltas(work)) as source:
            async for index, delta in source:
                tokens += len(delta.token_ids)
                if index in begun and not (delta.has_text or tokens_wanted):
                    continue  # its text is held back
                part = self._part(work, index, delta, index not in begun, characters.get(index, 0))
                characters[index] = characters.get(index, 0) + len(delta.content)
                chunk = head | {"choices": [part]} | ({"usage": None} if usage else {})
                if chat and work.request.return_token_ids and not begun:
                    chunk["prompt_token_ids"] = list(work.asked[0].prompt_ids)
                begun.add(index)
                yield event(chunk), delta
        if usage:
            yield event(head | {"choices": [], "usage": self.usage(work, tokens)}), None
        yield b"data: [DONE]\n\n", None

    def usage(self, work: Work, completion_tokens: int) -> Object:
        """Tokens of the request. A prompt counts once, however many choices it has."""
        total = work.prompt_tokens + completion_tokens
        return {"prompt_tokens": work.prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def _head(self, work: Work, suffix: str) -> Object:
        chat = isinstance(work.request, ChatRequest)
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{work.id}",
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": work.created,
            "model": self.name,
        }

    def _choice(self, work: Work, index: int, delta: Delta) -> Object:
        """A choice of a whole answer."""
        if isinstance(work.request, CompletionRequest):
            return self._part(work, index, delta, True, 0)
        message: Object = {"role": "assistant", "content": delta.content}
        if work.separate:
            message["reasoning_content"] = delta.reasoning or None
        return self._common(work, index, delta) | {"message": message}

    def _part(self, work: Work, index: int, delta: Delta, first: bool, characters: int) -> Object:
        """A choice's part in an event. characters: of the choice's text before it."""
        common = self._common(work, index, delta, characters)
        if isinstance(work.request, CompletionRequest):
            if work.request.return_token_ids and first:
                common["prompt_token_ids"] = list(work.asked[index // (work.request.n or 1)].prompt_ids)
            return common | {"text": delta.content}
        part: Object = {"role": "assistant"} if first else {}
        if delta.content or (first and not delta.reasoning):
            part["content"] = delta.content
        if delta.reasoning:
            part["reasoning_content"] = delta.reasoning
        return common | {"delta": part}

    def _common(self, work: Work, index: int, delta: Delta, characters: int = 0) -> Object:
        choice: Object = {"index": index, "logprobs": None, "finish_reason": delta.finish_reason}
        if work.request.alternatives is not None:
            choice["logprobs"] = (
                self._texts.chat_logprobs(delta)
                if isinstance(work.request, ChatRequest)
                else self._texts.completion_logprobs(delta, characters)
            )
        if work.request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice


def event(value: Mapping[str, object]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Mapping[str, object]) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


async def prepared(answers: Answers, request: Request) -> Work:
    """`Answers.prepare`, in a thread. Errors: BadRequest."""
    return await asyncio.to_thread(answers.prepare, request)


async def _numbered(
    source: AsyncGenerator[tuple[int, Delta], None], begin: int
) -> AsyncGenerator[tuple[int, Delta], None]:
    async with aclosing(source) as each:
        async for index, delta in each:
            yield begin + index, delta


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What all sources give, each when it comes. Errors: the first of a source, which ends the others."""
    items = asyncio.Queue[T | asyncio.Task[None]]()

    async def drain(source: AsyncGenerator[T, None]) -> None:
        async with aclosing(source) as each:
            async for item in each:
                await items.put(item)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    for task in tasks:
        task.add_done_callback(items.put_nowait)
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, asyncio.Task):
                item.result()
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
