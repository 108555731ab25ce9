"""Which failures end a sample, and which end the work.

A sample that fails for good does not end the others: they go on, and the error is raised at the end. Only a failure
that all of them share (a rejected key, no credit, several failures in a row) stops the work: nothing new is asked for.
What is under way is paid for, so after a refusal of the key or the account it is waited for; where the server seems to
be down, for some seconds only.

A refused request says nothing of the others: a rerun meets the same refusals first, and would never get past them. Of
many refusals in a row nobody knows whether they are the prompts' or the settings': another question tells
(`RemoteBackend`).
"""

import math
from typing import NamedTuple

from distill.errors import UserError, WorkError
from distill.prompts.prompt import Prompt

IN_A_ROW = 5  # samples that fail for good, with no answer between them: the server is down
REFUSED_IN_A_ROW = 100  # refusals with no answer between them, after which the server is asked something else
GRACE = 10.0  # seconds that other requests under way get after several have failed in a row


class Rejected(UserError):
    """A refusal of the key, the account or the model, which every request would get."""


class Forbidden(UserError):
    """A refusal with status 403, which means the key at one server, and this prompt at the firewall of another.
    of_prompt: the message where it is the prompt."""

    def __init__(self, message: str, of_prompt: str) -> None:
        super().__init__(message)
        self.of_prompt = of_prompt


class ParameterRefused(UserError):
    """A refusal of a sampling parameter that other samples were drawn with."""


class OneSample(Exception):
    """A failure that says nothing about other samples. error: what the caller gets to see."""

    def __init__(self, error: UserError | WorkError, prompt: Prompt, samples: tuple[int, ...]) -> None:
        super().__init__(error.of_prompt if isinstance(error, Forbidden) else str(error))
        self.error, self.prompt, self.samples = error, prompt, samples


class Refusal(NamedTuple):
    """A sample that the server refuses, and why."""

    prompt: Prompt
    sample: int
    reason: str


class Refused(UserError):
    """A server refuses some requests for what they are, and answers others. refusals: all of them."""

    def __init__(self, message: str, refusals: list[Refusal]) -> None:
        super().__init__(message)
        self.refusals = refusals


class Failures:
    """The failures of one call. answered: whether the server has answered a request before. deadline: when requests
    under way are given up, once the work is stopped."""

    def __init__(self, answered: bool = False) -> None:
        self.answered, self.deadline, self.stopped = answered, math.inf, False
        self.refused_in_a_row = 0
        self._in_a_row = 0
        self._forbidden = set[str]()  # prompts in a row
        self._errors: list[BaseException] = []
        self._refuses_all: UserError | None = None

    def answer(self) -> None:
        """Count an answer."""
        self.answered = True
        self._in_a_row = self.refused_in_a_row = 0
        self._forbidden.clear()

    def add(self, error: BaseException, now: float) -> None:
        """Count a failure, and stop the work where all samples share it, or the server seems to be down."""
        self._errors.append(error)
        if not isinstance(error, OneSample):
            self._stop(math.inf if isinstance(error, Rejected) else now + GRACE)
            return
        if isinstance(error.error, Forbidden):
            self._forbidden.add(error.prompt.id)
        if isinstance(error.error, UserError):
            self.refused_in_a_row += 1
        else:
            self._in_a_row += 1
        if max(self._in_a_row, len(self._forbidden)) >= IN_A_ROW:
            self._stop(now + GRACE)

    def _stop(self, deadline: float) -> None:
        if not self.stopped:
            self.stopped, self.deadline = True, deadline

    def refuse(self) -> None:
        """Stop the work because of the refusals in a row, which are not the prompts'."""
        first = next(error for error in self._errors if isinstance(error, OneSample))
        self._refuses_all = UserError(
            f"the server refuses every request, the last {self.refused_in_a_row:,} without an exception; the first: "
            f"{first}"
        )
        self._stop(math.inf)

    def raise_first(self) -> None:
        """Raise the failure that stopped the work, else the first one with the number of all; none without any.

        Errors: Refused where all of them are refusals of single samples.
        """
        shared = next((error for error in self._errors if not isinstance(error, OneSample)), self._refuses_all)
        if shared is not None:
            raise shared
        failures = [error for error in self._errors if isinstance(error, OneSample)]
        if not failures:
            return
        refused = [failure for failure in failures if not self._is_no_refusal(failure.error)]
        shown = [failure for failure in failures if failure not in refused] or refused
        first, count = shown[0].error, sum(len(failure.samples) for failure in shown)
        several = f"{count:,} samples failed; the first: " if count > 1 else ""
        message = f"{several}{shown[0] if self.answered else first}"
        if shown is not refused:
            raise (WorkError if isinstance(first, WorkError) else UserError)(message) from first
        refusals = [Refusal(each.prompt, sample, str(each)) for each in refused for sample in each.samples]
        raise Refused(message, refusals) from first

    def _is_no_refusal(self, error: UserError | WorkError) -> bool:
        """Whether a failure says nothing about the prompt."""
        key = isinstance(error, Forbidden) and (self.stopped or not self.answered)
        return key or isinstance(error, WorkError | ParameterRefused)
