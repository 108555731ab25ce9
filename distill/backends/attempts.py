"""The requests of one call of a server: what they share, what one attempt has brought, and why another may follow."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from distill.backends.backend import Completed
from distill.backends.budget import Allowance
from distill.backends.failures import OneSample
from distill.backends.reply import Counts
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.prompts.prompt import Prompt

UNKNOWN = Counts(None, None)


@dataclass
class Asked:
    """One attempt of a request. begun: whether something of an answer came. usage: its tokens, as far as they are
    known. empty: whether the whole answer came, without a text."""

    prompt: Prompt
    samples: tuple[int, ...]
    body: Mapping[str, object]
    begun: bool = False
    usage: Counts = UNKNOWN
    empty: bool = False

    def failed(self, error: UserError | WorkError) -> OneSample:
        """The failure of these samples alone."""
        return OneSample(error, self.prompt, self.samples)


@dataclass
class Answered:
    """What one request brought: answers, and the errors of the samples without one."""

    completed: list[Completed] = field(default_factory=list)
    errors: list[UserError | WorkError | OneSample] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What all requests of one call share. ended: set when no further attempt is to begin."""

    sampling: SamplingParams
    seed: int
    allowance: Allowance | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def may_repeat(self, asked: Asked) -> bool:
        """Count a failed attempt whose answer had begun; whether the allowance has room for another one."""
        if self.allowance is None or not asked.begun:
            return True
        prompt, completion = asked.usage
        if completion == 0 and not asked.empty:
            completion = None  # no count of what had come
        return self.allowance.lose(asked.prompt, prompt, completion, len(asked.samples))

    async def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until the work has ended."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)


class Again(Exception):
    """A request that failed and may be sent again. wait: seconds that the server asks for. at_once: without a pause.
    alone: several samples one by one."""

    def __init__(
        self,
        failure: UserError | WorkError,
        wait: float | None = None,
        at_once: bool = False,
        alone: bool = False,
    ) -> None:
        super().__init__(str(failure))
        self.failure, self.wait, self.at_once, self.alone = failure, wait, at_once, alone
