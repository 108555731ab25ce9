"""Which failures end a sample, and which end the work.

A sample that fails for good does not end the others: they go on, and the error is raised at the end. Only a failure
that all of them share (a rejected key, several failures in a row) stops the work.
"""

from distill.errors import UserError, WorkError

IN_A_ROW = 5  # samples that fail for good, with no answer between them: the server is down
GRACE = 10.0  # seconds that other requests under way get after one has failed for good


class OneSample(Exception):
    """A failure that says nothing about other samples. error: what the caller gets to see."""

    def __init__(self, error: UserError | WorkError) -> None:
        super().__init__(str(error))
        self.error = error


class Refused(UserError):
    """A server refuses some requests for what they are, and answers others."""


class Failures:
    """The failures of one call. deadline: when requests under way are given up, once the work is stopped."""

    def __init__(self) -> None:
        self.deadline = 0.0
        self.in_a_row = 0
        self.stopped = False
        self._errors: list[BaseException] = []

    def add(self, error: BaseException, now: float) -> None:
        """Count a failure, and stop the work where all samples share it, or the server seems to be down.

        A refused request does not count as such: a rerun meets the same refusals first, and would never get past them.
        """
        self._errors.append(error)
        self.in_a_row += not (isinstance(error, OneSample) and isinstance(error.error, UserError))
        if not self.stopped and (not isinstance(error, OneSample) or self.in_a_row >= IN_A_ROW):
            self.stopped, self.deadline = True, now + GRACE

    def raise_first(self) -> None:
        """Raise the failure that stopped the work, else the first one with the number of all; none without any."""
        shared = next((error for error in self._errors if not isinstance(error, OneSample)), None)
        if shared is not None:
            raise shared
        failures = [error.error for error in self._errors if isinstance(error, OneSample)]
        if not failures:
            return
        refused = all(isinstance(failure, UserError) for failure in failures)
        kind = Refused if refused else type(failures[0])
        several = f"{len(failures):,} samples failed; the first: " if len(failures) > 1 else ""
        raise kind(f"{several}{failures[0]}") from failures[0]
