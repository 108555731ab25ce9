"""One trace as a row of Parquet columns, exactly.

- Log-probabilities are float32, the precision that engines compute them in. They are rounded once, when a trace is
  appended, so it reads the same before and after compaction.
- Parquet text is UTF-8, which cannot hold a lone surrogate. A trace that has one is stored a second time, whole, as
  ASCII JSON in the column `exact` (null for all others), and its text columns show U+FFFD; reading gives back the
  original.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from distill.prompts.prompt import Prompt
from distill.traces.ledger import Row
from distill.traces.trace import Trace, Verdict

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("text", pa.string()),
        ("reasoning", pa.string()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("teacher", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("top_logprobs", pa.list_(pa.list_(pa.struct([("token", pa.int32()), ("logprob", pa.float32())])))),
        ("exact", pa.string()),
        ("completion_tokens", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("reasoning_tokens", pa.int32()),
        ("form", pa.string()),
        ("omitted", pa.list_(pa.string())),
    ]
)
TOKEN_COLUMNS = ("prompt_token_ids", "completion_token_ids", "logprobs", "top_logprobs")  # most of a trace's bytes
TEXT_COLUMNS = [name for name in SCHEMA.names if name not in TOKEN_COLUMNS]
VERDICTS = pa.field(  # evidence: JSON
    "verdicts",
    pa.list_(
        pa.struct([("filter", pa.string()), ("keep", pa.bool_()), ("reason", pa.string()), ("evidence", pa.string())])
    ),
)


def table_of(traces: Iterable[Trace]) -> pa.Table:
    """The traces as a table with `SCHEMA`."""
    return pa.Table.from_pylist([_row(trace) for trace in traces], schema=SCHEMA)


def with_all_columns(table: pa.Table) -> pa.Table:
    """The table with `SCHEMA`; columns that an earlier version did not write are null."""
    for field in SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(SCHEMA.names)


def verdict_column(verdicts: Iterable[Sequence[Verdict]]) -> pa.Array:
    """The column `VERDICTS`: the verdicts of one trace after the other."""
    rows = [[v.to_dict() | {"evidence": json.dumps(v.evidence)} for v in of_trace] for of_trace in verdicts]
    return pa.array(rows, VERDICTS.type)


def trace_of(row: Row) -> Trace:
    """The trace in a row; one without token ids and log-probabilities where the row lacks those columns."""
    if row["exact"] is not None:
        trace = Trace.from_dict(json.loads(row["exact"]))
        return trace if "completion_token_ids" in row else without_tokens(trace)
    top, logprobs = row.get("top_logprobs"), row.get("logprobs")
    return Trace(
        prompt=Prompt(tuple(row["messages"][:-1]), row["task"], row["answer"], row["source"], row["id"]),
        sample=row["sample"],
        seed=row["seed"],
        text=row["text"],
        reasoning=row["reasoning"],
        response=row["response"],
        finish_reason=row["finish_reason"],
        teacher=row["teacher"],
        prompt_token_ids=tuple(row.get("prompt_token_ids", ())),
        completion_token_ids=tuple(row.get("completion_token_ids", ())),
        logprobs=None if logprobs is None else tuple(logprobs),
        top_logprobs=None if top is None else tuple(tuple((c["token"], c["logprob"]) for c in alts) for alts in top),
        completion_tokens=row["completion_tokens"],
        prompt_tokens=row.get("prompt_tokens"),
        cached_tokens=row.get("cached_tokens"),
        reasoning_tokens=row.get("reasoning_tokens"),
        form=row.get("form"),
        omitted=tuple(row.get("omitted") or ()),
    )


def without_tokens(trace: Trace) -> Trace:
    """The trace without token ids and log-probabilities; `tokens` stays."""
    return replace(trace, prompt_token_ids=(), completion_token_ids=(), logprobs=None, top_logprobs=None)


def verdicts_of(row: Row) -> list[Verdict]:
    """The verdicts in a row, none where it has no such column."""
    stored = row.get("verdicts") or []
    return [Verdict(v["filter"], v["keep"], v["reason"], json.loads(v["evidence"])) for v in stored]


def rounded(trace: Trace) -> Trace:
    """The trace with its log-probabilities as float32 can hold them."""
    if trace.logprobs is not None:
        trace = replace(trace, logprobs=tuple(array("f", trace.logprobs)))
    if trace.top_logprobs is not None:
        trace = replace(trace, top_logprobs=tuple(tuple(_rounded_pairs(top)) for top in trace.top_logprobs))
    return trace


def _row(trace: Trace) -> Row:
    prompt = trace.prompt
    row: Row = {
        "id": prompt.id,
        "sample": trace.sample,
        "seed": trace.seed,
        "task": prompt.task,
        "answer": prompt.answer,
        "source": prompt.source,
        "messages": trace.messages,
        "text": trace.text,
        "reasoning": trace.reasoning,
        "response": trace.response,
        "finish_reason": trace.finish_reason,
        "teacher": trace.teacher,
        "prompt_token_ids": trace.prompt_token_ids,
        "completion_token_ids": trace.completion_token_ids,
        "logprobs": trace.logprobs,
        "top_logprobs": trace.top_logprobs,
        "exact": None,
        "completion_tokens": trace.completion_tokens,
        "prompt_tokens": trace.prompt_tokens,
        "cached_tokens": trace.cached_tokens,
        "reasoning_tokens": trace.reasoning_tokens,
        "form": trace.form,
        "omitted": list(trace.omitted),
    }
    if trace.top_logprobs is not None:
        row["top_logprobs"] = [[{"token": t, "logprob": p} for t, p in top] for top in trace.top_logprobs]
    if not _is_utf8(trace):
        row = {key: _without_surrogates(value) for key, value in row.items()} | {"exact": json.dumps(trace.to_dict())}
    return row


def _rounded_pairs(pairs: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    return zip((token for token, _ in pairs), array("f", [logprob for _, logprob in pairs]), strict=True)


def _is_utf8(trace: Trace) -> bool:
    prompt = trace.prompt
    texts = [prompt.answer or "", prompt.source, trace.text, trace.reasoning or "", trace.response]
    texts += [trace.finish_reason or "", *(message["content"] for message in prompt.messages)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {key: _without_surrogates(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(inner) for inner in value]
    return value
