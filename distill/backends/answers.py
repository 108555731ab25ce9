"""An answer of a server as a sample: what it must have, whether it came by a request or in a batch."""

from distill.backends.backend import Completed
from distill.backends.connection import KEPT
from distill.backends.reply import Reply
from distill.chat import THINK
from distill.engine.options import SamplingParams
from distill.errors import UserError
from distill.models import Server
from distill.prompts.prompt import Prompt, split_reasoning

OVER_BUDGET = 64  # tokens of reasoning past a thinking budget that its closing may take


def check_answer(where: str, reply: Reply, sampling: SamplingParams) -> None:
    """Check that an answer has what was asked for. where: the server's address. Errors: UserError."""
    budget, thought = sampling.thinking_budget, _thought(reply)
    if budget is not None and thought > budget + OVER_BUDGET:
        raise UserError(
            f"{where}: the server ignores thinking_budget: {thought:,} tokens of reasoning instead of "
            f"{budget:,}; start it with a reasoning parser (vLLM: --reasoning-parser; SGLang: also "
            f"--enable-strict-thinking), or set generate.sampling.thinking_budget to null; {KEPT}"
        )
    if sampling.logprobs is not None and reply.top_logprobs is None and reply.text:  # one that is withheld has none
        raise UserError(
            f"{where}: the server gives no log-probabilities with token ids; set generate.logprobs to "
            f"null, or use a server that does (vLLM, distill serve); {KEPT}"
        )


def check_mode(where: str, server: Server, reply: Reply) -> None:
    """Check that a server that is asked not to think does not. Errors: UserError."""
    reasoning, _ = _split(reply)
    cut_off = reasoning is None and reply.text.lstrip().startswith(THINK)
    if server.without_thinking and (reasoning or cut_off):
        raise UserError(
            f"{where}: the server ignores thinking: false (sent as chat_template_kwargs): its answer has reasoning; "
            f"set server.extra_body to the server's own field, such as thinking: {{type: disabled}}; {KEPT}"
        )


def _split(reply: Reply) -> tuple[str | None, str]:
    """Reasoning and response."""
    return reply.parts or split_reasoning(reply.text)


def _thought(reply: Reply) -> int:
    """Tokens of reasoning, at least: as the server counts them, else those that the response cannot have, as a token
    has at least one byte."""
    if reply.reasoning_tokens is not None:
        return reply.reasoning_tokens
    return (reply.completion_tokens or 0) - len(_split(reply)[1].encode())


def completed(prompt: Prompt, sample: int, reply: Reply, omitted: tuple[str, ...]) -> Completed:
    """The sample that an answer is. omitted: as of `Trace`."""
    from distill.engine.alternatives import Alternatives  # imports numpy

    return Completed(
        prompt,
        sample,
        reply.text,
        reply.finish_reason,
        prompt_token_ids=reply.prompt_token_ids,
        completion_token_ids=reply.completion_token_ids,
        logprobs=reply.logprobs,
        top=None if reply.top_logprobs is None else Alternatives.of(reply.top_logprobs),
        completion_tokens=reply.completion_tokens,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        reasoning_tokens=reply.reasoning_tokens,
        form=reply.form,
        parts=reply.parts,
        omitted=omitted,
    )
