"""An answer of a server as a sample: what it must have, whether it came by a request or in a batch."""

from distill.backends.backend import Completed
from distill.backends.connection import KEPT
from distill.backends.reply import Reply
from distill.engine.options import SamplingParams
from distill.errors import UserError
from distill.prompts.prompt import Prompt

OVER_BUDGET = 64  # tokens of reasoning past a thinking budget that its closing may take


def check_answer(where: str, reply: Reply, sampling: SamplingParams) -> None:
    """Check that an answer has what was asked for. where: the server's address. Errors: UserError."""
    budget, thought = sampling.thinking_budget, reply.reasoning_tokens or 0
    if budget is not None and thought > budget + OVER_BUDGET:
        raise UserError(
            f"{where}: the server ignores thinking_budget: {thought:,} tokens of reasoning instead of "
            f"{budget:,}; start it with a reasoning parser (vLLM: --reasoning-parser; SGLang: also "
            f"--enable-strict-thinking), or set generate.sampling.thinking_budget to null; {KEPT}"
        )
    if sampling.logprobs is not None and reply.top_logprobs is None:
        raise UserError(
            f"{where}: the server gives no log-probabilities with token ids; set generate.logprobs to "
            f"null, or use a server that does (vLLM, distill serve); {KEPT}"
        )


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
