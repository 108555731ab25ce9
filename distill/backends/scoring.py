"""Log-probabilities of given texts from a server: vLLM's `prompt_logprobs`.

The trace is sent as token ids, prompt and completion together, to the completions endpoint, which returns for every
position the log-probability of its token and of the most likely ones, with ids. Other servers have nothing that says
as much: SGLang's input log-probabilities are an endpoint of its own, APIs have none.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx2

from distill.backends.backend import GivenIds
from distill.backends.bounds import TooLarge
from distill.backends.connection import Connection, is_refusal
from distill.backends.reply import Unreadable, as_object, read_json
from distill.chat import Chat
from distill.errors import UserError, WorkError
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TIMEOUT = 600.0  # seconds without a byte
POSITION_BYTES = 256  # of one alternative at one position


def remedy(traces: Sequence[Trace], top_k: int) -> str:
    """What to do where a server does not score these texts: the end of an error."""
    most = max((trace.listed for trace in traces), default=0)
    if 0 < most < top_k:
        return (
            f"the traces list {most} likely tokens (generate.logprobs) and {top_k} are asked for: set "
            f"train.objective.top_k to {most}, or use a local teacher"
        )
    return "use a local teacher, or traces that were sampled with generate.logprobs"


def completion_ids(trace: Trace, chat: Chat, vocab_size: int | None = None) -> list[int]:
    """The tokens of a trace's completion: as they were sampled, where they are this model's and give the trace's text,
    else the text tokenized, with the end token."""
    ids = list(trace.completion_token_ids)
    known = bool(ids) and (vocab_size is None or max(ids) < vocab_size)
    text = trace.text.removeprefix(chat.prefill)
    # Another model's end token may be a control token here, which has no text.
    ends = trace.finish_reason != "stop" or (known and ids[-1] in chat.stop_token_ids)
    return ids if known and ends and chat.decode(ids) == text else [*chat.text_ids(text), chat.stop_token_ids[-1]]


def refuse_other_lengths(ids: GivenIds, completions: Sequence[Sequence[int]]) -> None:
    """Errors: UserError where ids are not given for each token of each completion."""
    for number, (rows, completion) in enumerate(zip(ids, completions, strict=True)):
        if len(rows) != len(completion):
            raise UserError(
                f"ids are given for {len(rows)} tokens of trace {number}, whose completion has {len(completion)} for "
                "the model that scores it; both models must have the same tokenizer"
            )


def score(
    connection: Connection,
    model: str,
    chat: Chat,
    traces: Sequence[Trace],
    top_k: int,
    ids: GivenIds | None = None,
) -> list[Trace]:
    """The traces with the log-probabilities of their tokens and of the `top_k` most likely at each position. ids: as of
    `Backend.score`; those that the server does not list stay unknown.

    Errors: UserError where the server refuses, or gives none; WorkError when it fails.
    """
    rows = [
        (trace, chat.prompt_ids_of(trace.prompt.messages, trace.text), completion_ids(trace, chat)) for trace in traces
    ]
    if ids is not None:
        refuse_other_lengths(ids, [completion for _, _, completion in rows])
    wanted: Sequence[Sequence[frozenset[int]]] = [[frozenset()] * len(completion) for _, _, completion in rows]
    if ids is not None:
        wanted = [list(map(frozenset, ids_tm.tolist())) for ids_tm in ids]
    longest = max((len(prompt) + len(completion) for _, prompt, completion in rows), default=0)

    async def ask() -> list[Trace]:
        limit = asyncio.Semaphore(connection.pace.most)
        async with connection.new_client(TIMEOUT, longest * (top_k + 1) * POSITION_BYTES) as client:

            async def scored(row: tuple[Trace, list[int], list[int]], wanted_ids: Sequence[frozenset[int]]) -> Trace:
                async with limit:
                    return await _scored(client, connection, model, *row, top_k, wanted_ids)

            return list(await asyncio.gather(*map(scored, rows, wanted)))

    with asyncio.Runner() as runner:
        return runner.run(ask())


async def _scored(
    client: "AsyncOpenAI",
    connection: Connection,
    model: str,
    trace: Trace,
    prompt: list[int],
    completion: list[int],
    top_k: int,
    wanted: Sequence[frozenset[int]],
) -> Trace:
    import openai

    try:
        raw = await client.completions.with_raw_response.create(
            model=model, prompt=[*prompt, *completion], max_tokens=1, extra_body={"prompt_logprobs": top_k}
        )
        positions = _positions(raw.http_response.content)
        logprobs, tops = [], []
        own = positions[len(prompt) : len(prompt) + len(completion)]
        for token, position, also in zip(completion, own, wanted, strict=True):
            alternatives = _alternatives(position)
            logprobs.append(alternatives[token])
            ranked = sorted(alternatives.items(), key=lambda item: -item[1])
            tops.append((*ranked[:top_k], *(item for item in ranked[top_k:] if item[0] in also)))
    except (Unreadable, ValueError, KeyError) as error:
        raise UserError(
            f"{connection.where}: the server does not score texts (its answer lacks prompt_logprobs of every token); "
            f"use vLLM, or the teacher's weights on this machine"
        ) from error
    except (openai.OpenAIError, httpx2.HTTPError) as error:
        if isinstance(error, openai.APIStatusError) and is_refusal(error.status_code) and "logprobs" in str(error):
            raise UserError(
                f"{connection.where}: the server refused the request: {connection.secrets.reason(error)}; start vLLM "
                f"with --max-logprobs {top_k}, or lower train.objective.top_k"
            ) from error
        raise connection.error(error, trace.prompt) from error
    except TooLarge as error:
        raise WorkError(f"the server failed: {error}") from error
    return replace(
        trace,
        prompt_token_ids=tuple(prompt),
        completion_token_ids=tuple(completion),
        logprobs=tuple(logprobs),
        top_logprobs=tuple(tops),
    )


def _positions(body: bytes) -> list[object]:
    """`prompt_logprobs` of a reply: one entry a token of the prompt. Errors: Unreadable."""
    reply = as_object(read_json(body), "the reply")
    choices = reply.get("choices")
    choice = as_object(choices[0], "a choice") if isinstance(choices, list) and choices else {}
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list):
        raise Unreadable("it has no prompt_logprobs")
    return positions


def _alternatives(position: object) -> dict[int, float]:
    """Token id → log-probability. Errors: Unreadable; ValueError."""
    alternatives = {}
    for token, value in as_object(position, "a position").items():
        logprob = as_object(value, "a token").get("logprob")
        if not isinstance(logprob, int | float) or isinstance(logprob, bool) or not math.isfinite(logprob):
            raise Unreadable("a log-probability is no number")
        alternatives[int(token)] = float(logprob)
    return alternatives
