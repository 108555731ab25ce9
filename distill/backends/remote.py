"""A server with an OpenAI-compatible address (vLLM, SGLang, llama.cpp, an API) as a backend.

One request a sample, many at once: servers batch what arrives together. Coroutines and not threads: a thread that waits
for an answer cannot be stopped, and an interruption would last as long as the longest request. The seed of a request is
a hash of (seed, prompt, sample), so that a server that honours it repeats itself. Reasoning that a server returns apart
from the answer is put back into `<think>`. The address is no part of the identity: a run may move to another server of
the same model.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from distill.backends import Completed, Job, Sampling, Usage
from distill.chat import THINK
from distill.errors import UserError, WorkError
from distill.fingerprint import digest
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 5  # with growing pauses: of a server that is busy, restarts, drops a connection or answers nothing
FIRST_PAUSE = 2.0  # seconds
GAVE_UP = "insufficient_system_resource"  # DeepSeek's reason for an answer that it did not finish
TIMEOUT = 3600.0  # seconds for one sample: 32,768 tokens at 10 a second


class RemoteBackend:
    """url, key: of the server; model: as it calls it; concurrency: requests under way at once."""

    def __init__(self, url: str, model: str, concurrency: int = 64, key: str | None = None) -> None:
        self.model, self.concurrency = model, concurrency
        self.identity: dict[str, JsonValue] = {"model": model}
        self.numerics = {"server": "unknown"}
        self.max_context = None
        self.usage = Usage()
        self._server: dict[str, Any] = {"base_url": url.rstrip("/"), "api_key": key or "none"}

    @classmethod
    def connect(
        cls, url: str, model: str | None = None, concurrency: int = 64, key: str | None = None
    ) -> "RemoteBackend":
        """Ask the server which models it has. UserError when nobody answers there, or `model` is none of them."""
        import openai

        try:
            with openai.OpenAI(base_url=url.rstrip("/"), api_key=key or "none", max_retries=1, timeout=30.0) as client:
                names = [item.id for item in client.models.list()]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{url}: it lets nobody in ({_reason(error)}); set OPENAI_API_KEY to a key of it"
            ) from error
        except (openai.OpenAIError, ValueError, AttributeError) as error:
            raise UserError(
                f"{url}: no model server answers there ({_reason(error)}); give an OpenAI-compatible address, as "
                f"http://localhost:8000/v1"
            ) from error
        if model is None and len(names) == 1:
            model = names[0]
        if model is None or (names and model not in names):
            asked = "which model?" if model is None else f"it has no model {model};"
            raise UserError(f"{url}: {asked} there are {', '.join(names) or 'none'}: choose with --name")
        return cls(url, model, concurrency, key)

    def check(self, prompts: Iterable[Prompt], sampling: Sampling) -> None:
        """The server knows its context; it refuses what does not fit."""

    def score(self, traces: Sequence[Trace], top_k: int) -> list[Trace]:
        """Refused: chat servers do not score texts."""
        raise UserError(f"{self.model} is behind a server, which does not score texts; use a local teacher")

    def close(self) -> None:
        """Connections are closed by `complete`."""

    def complete(self, jobs: Iterable[Job], sampling: Sampling, seed: int) -> Iterator[Completed]:
        """Yield every wanted sample once, as it finishes. WorkError, after retries, when the server fails."""
        import openai

        wanted = ((job.prompt, sample) for job in jobs for sample in job.samples)
        running: set[asyncio.Task[Completed]] = set()
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            client = openai.AsyncOpenAI(**self._server, max_retries=RETRIES, timeout=TIMEOUT)
            try:
                while True:
                    for prompt, sample in islice(wanted, self.concurrency - len(running)):
                        running.add(loop.create_task(self._sample(client, prompt, sample, sampling, seed)))
                    if not running:
                        return
                    waited = asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    done, running = loop.run_until_complete(waited)
                    for one in sorted(done, key=lambda one: one.exception() is not None):  # what succeeded is kept
                        yield one.result()
            finally:
                for one in running:
                    one.cancel()
                runner.run(client.close())

    async def _sample(
        self, client: "AsyncOpenAI", prompt: Prompt, sample: int, sampling: Sampling, seed: int
    ) -> Completed:
        import openai

        pause = FIRST_PAUSE
        for left in reversed(range(RETRIES + 1)):
            try:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": m["role"], "content": m["content"]} for m in prompt.messages],  # type: ignore[misc]
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=int(digest([seed, prompt.id, sample]), 16) % 2**31,
                    extra_body={"top_k": sampling.top_k} if sampling.top_k else None,
                )
            except openai.BadRequestError as error:
                raise UserError(
                    f"prompt {prompt.id}: the server refuses it: {_reason(error)}; if it is too long, lower "
                    f"max_new_tokens"
                ) from error
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise UserError(_refused(error)) from error
            except openai.OpenAIError as error:
                raise WorkError(_failed(_reason(error))) from error
            except ValueError:  # what came is no JSON
                reply = None
            done = _completed(reply, prompt, sample)
            if done is not None:
                return done
            if left:
                await asyncio.sleep(pause)
                pause *= 2
        raise WorkError(_failed("its answers are empty or unreadable, as those of a server under load may be"))


def _completed(reply: Any, prompt: Prompt, sample: int) -> Completed | None:
    """None for an answer without a token: that of a server that gave up, and not of a model."""
    choices = getattr(reply, "choices", None)  # a page in HTML comes as its text
    choice = choices[0] if choices else None
    message = choice.message if choice else None
    if choice is None or message is None or choice.finish_reason == GAVE_UP:
        return None
    content = message.content or ""
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    tokens = reply.usage.completion_tokens if reply.usage else None
    if not (content or reasoning or tokens):
        return None
    if reasoning:
        closed = f"\n</think>\n\n{content}" if content else ""
        content = f"{THINK}\n{reasoning.strip()}{closed}"
    return Completed(
        prompt=prompt,
        sample=sample,
        text=content,
        finish_reason="length" if choice.finish_reason == "length" else "stop",
        prompt_token_ids=(),
        completion_token_ids=(),
        completion_tokens=tokens,
    )


def _refused(error: Exception) -> str:
    return f"the server lets nobody in ({_reason(error)}); set OPENAI_API_KEY to a key of its"


def _failed(why: str) -> str:
    return f"the server failed: {why}; what was finished is kept, run the same command to go on"


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
