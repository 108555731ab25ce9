"""What a request says beyond the OpenAI protocol's common part, which differs from server to server.

A server is known by `owned_by` in its list of models. Ours and vLLM give token ids, which let traces carry
probabilities; only ours takes the prompt's key and the sample's number, with which its text is that of a local run,
token for token. To all others a sample's seed is a hash of (seed, prompt, sample), so that one that honours seeds
repeats itself.

Some models refuse parameters that others need: `max_tokens` where `max_completion_tokens` is meant, a temperature where
they have their own. A refused parameter is left out of all further requests, and this is said once. A refusal names its
parameter in the error's `param`; where an error has no such field, only in quotes beside a word of refusal, or as its
subject: the text of a prompt may be in the message too. Of several names the one nearest to the word is meant, and none
that comes as advice (`allowed: …`, `did you mean …`).

The parameters of `SAMPLING` decide what the samples are. They are left out before the first answer only; a later
refusal is that of one request. An answer knows which ones its request lacked, so that `collect` can refuse a mixture.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from distill.console import say
from distill.engine.options import SamplingParams
from distill.errors import UserError
from distill.fingerprint import digest
from distill.models import Server
from distill.prompts.prompt import Prompt

OURS, VLLM = "distill", "vllm"  # values of owned_by
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the token limit; some models refuse the first
THINKING_BUDGET = {  # owner → the field of a thinking budget, a dot before a field inside it
    OURS: "thinking_budget",
    VLLM: "thinking_token_budget",
    "sglang": "custom_params.thinking_budget",
    "llamacpp": "thinking_budget_tokens",
}
MODERATION = re.compile(
    r"content[ _-]*(filter|policy|not allowed|exists risk)|moderation|safety|flagged|inappropriate|data_inspection",
    re.I,
)
MOST_CHOICES = 128  # samples of one request, as OpenAI bounds `n`
OPTIONAL = ("temperature", "top_p", "top_k", "seed", "stream_options", "n")  # left out where a model refuses them
SAMPLING = ("temperature", "top_p", "top_k")  # those of them that decide what the samples are
CODES = ("unsupported_parameter", "unsupported_value", "unknown_parameter")  # OpenAI's, of such refusals
WORDS = r"support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra|invalid param"
REFUSAL = re.compile(WORDS, re.I)
BETWEEN = r"\W+(?:(?:is|are|does|do|not|parameters?|arguments?|fields?|request|supplied|value|option)\W+){0,4}"
ADVICE = re.compile(  # after it, a message names what would be taken
    r"did you mean|(?<!not )(?<!n't )\b(?:allowed|supported|valid|accepted|available)(?:\s+\w+)?\s*(?:\bare\b|:)"
    r"|\buse\b.{1,80}\binstead",
    re.I | re.S,
)
NEAR = 60  # characters between a quoted name and the word of its refusal


class Asking:
    """Makes the bodies of requests. owners: who has each of the servers, "" if unknown; the first is meant where a
    request names none."""

    def __init__(self, server: Server, *owners: str) -> None:
        self.model, self.owners = server.model or "", owners or ("",)
        self._stream, self._n, self._extra = server.stream, server.n, dict(server.extra_body)
        self.limit = LIMITS[0]
        self._refused = set[str]()
        self.has_answered = False

    def group(self, samples: Sequence[int]) -> list[tuple[int, ...]]:
        """The samples of a prompt that are asked for together: with `n` all of them, as far as they are consecutive."""
        if not self._n or "n" in self._refused:
            return [(sample,) for sample in samples]
        groups = list[tuple[int, ...]]()
        for sample in samples:
            follows = bool(groups) and groups[-1][-1] + 1 == sample and len(groups[-1]) < MOST_CHOICES
            groups = [*groups[:-1], (*groups[-1], sample)] if follows else [*groups, (sample,)]
        return groups

    def body(
        self,
        prompt: Prompt,
        sample: int,
        sampling: SamplingParams,
        seed: int,
        n: int = 1,
        owner: str | None = None,
    ) -> dict[str, object]:
        """The request for `n` samples, of which `sample` is the first. owner: who has the server that is asked."""
        owner = self.owners[0] if owner is None else owner
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in prompt.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(digest([seed, prompt.id, sample]), 16) % 2**31,
            self.limit: sampling.max_new_tokens,
        }
        if n > 1:
            body["n"] = n
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        if sampling.thinking_budget is not None:
            outer, _, inner = THINKING_BUDGET[owner].partition(".")
            body[outer] = {inner: sampling.thinking_budget} if inner else sampling.thinking_budget
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if owner == VLLM:
            body |= {"return_token_ids": True}
            if sampling.logprobs is not None:
                body["return_tokens_as_token_ids"] = True
        elif owner == OURS:
            body |= {"seed": seed, "prompt_key": prompt.id, "sample": sample}
            body |= {"return_token_ids": True, "separate_reasoning": False}
        return {name: value for name, value in body.items() if name not in self._refused} | self._extra

    def check(self, sampling: SamplingParams) -> None:
        """Errors: UserError for a thinking budget where it is not known how the server takes one."""
        unknown = next((owner for owner in self.owners if owner not in THINKING_BUDGET), None)
        if sampling.thinking_budget is not None and unknown is not None:
            raise UserError(
                f"thinking_budget: the server of {self.model} has no known field for it (owned_by {unknown!r}; "
                f"known: {', '.join(THINKING_BUDGET)}); set generate.sampling.thinking_budget to null, and the "
                f"server's own field in server.extra_body"
            )

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the parameters that requests lack from now on."""
        return tuple(sorted(self._refused | ({LIMITS[0]} if self.limit != LIMITS[0] else set())))

    def answered(self) -> None:
        """Count an answer: from now on no parameter of `SAMPLING` is left out."""
        self.has_answered = True

    def adapt(
        self, sent: Collection[str], status: int, reason: str, param: str | None = None, code: str | None = None
    ) -> bool:
        """Leave out what a reply refuses; whether the request is worth sending again.

        sent: names of the parameters that the request had. param, code: of the error, where it has these fields.
        """
        if status not in (400, 422) or (param is None and MODERATION.search(reason)):
            return False
        if LIMITS[0] in sent and LIMITS[0] not in self._extra and LIMITS[1] in reason:
            self.limit = LIMITS[1]
            return True
        name = _refused(reason, param, code)
        if name not in sent or name in self._extra:
            return False
        if name not in self._refused:
            if name in SAMPLING and self.has_answered:
                return False
            self._refused.add(name)
            say(f"note: {self.model} refuses {name}; it is left out, and the server's own applies")
        return True

    def blames_sampling(self, sent: Collection[str], reason: str, param: str | None, code: str | None) -> bool:
        """Whether a reply refuses a parameter of `SAMPLING`, which says nothing about the prompt. As `adapt`."""
        name = _refused(reason, param, code)
        return name in SAMPLING and name in sent


def omitted(body: Collection[str], sampling: SamplingParams) -> tuple[str, ...]:
    """Names of the parameters of `SAMPLING` that a request should have had and had not."""
    return tuple(name for name in SAMPLING if name not in body and (name != "top_k" or sampling.top_k))


def error_fields(error: Mapping[str, object]) -> tuple[str | None, str | None]:
    """`param` and `code` of OpenAI's error object, where they are texts."""
    param, code = error.get("param"), error.get("code")
    return (param if isinstance(param, str) else None), (code if isinstance(code, str) else None)


def _refused(reason: str, param: str | None, code: str | None) -> str:
    """The parameter of `OPTIONAL` that an error refuses, "" for none."""
    if param is not None:
        name = param.partition(".")[0]
        return name if name in OPTIONAL and (code in CODES or REFUSAL.search(reason)) else ""
    refusals = [match.span() for match in REFUSAL.finditer(reason)]
    advice = ADVICE.search(reason)
    gaps = {
        max(begin - stop, start - end): name
        for name in reversed(OPTIONAL)  # the first of equally near ones stays
        for start, stop in _mentions(name, reason)
        for begin, end in refusals
        if stop <= (advice.start() if advice else len(reason))
    }
    nearest = min(gaps, default=NEAR + 1)
    return gaps[nearest] if nearest <= NEAR else ""


def _mentions(name: str, reason: str) -> Iterator[tuple[int, int]]:
    """Where a message has a name as that of a parameter: in quotes, or beside a word of refusal."""
    for match in re.finditer(rf"[`'\"]{name}[`'\"](?!\s*:)", reason):  # a colon: a name in an echo of the request
        yield match.span()
    for pattern in (rf"\b({name})\b{BETWEEN}\w*(?:{WORDS})", rf"(?:{WORDS})\w*{BETWEEN}({name})\b"):
        for match in re.finditer(pattern, reason, re.I):
            yield match.span(1)
