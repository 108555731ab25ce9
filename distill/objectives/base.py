"""What an objective provides to the training.

Shapes: s supervised tokens of a batch, r of them in a block, k teacher tokens per position, v vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from distill.section import Section

if TYPE_CHECKING:
    from torch import Tensor

# A block of rows of the head's output: called with their logits [r, v] in float32, which it may overwrite, their range
# start … stop among the s supervised tokens, and whether a gradient is wanted. It returns the sums of the loss parts
# over these rows [parts]; the first part is differentiated, and its gradient is written over the logits.
Criterion = Callable[["Tensor", int, int, bool], "Tensor"]


class TopK(NamedTuple):
    """The teacher's most likely next tokens at the supervised positions of a batch, in the student's vocabulary.

    ids_sk: int64. logprobs_sk: float32, −∞ after the last token known; a position with none is unknown altogether.
    """

    ids_sk: "Tensor"
    logprobs_sk: "Tensor"


class BaseObjective(Section):
    """Base class of the objectives. A subclass adds `kind`, its fields, `tag`, `parts` and `criterion`.

    tag: on the model card. parts: name of each loss part in the log → its label in plots; the first, "loss", is the one
    that is minimised. All are sums over supervised tokens, in nats.
    """

    tag: ClassVar[str]
    parts: ClassVar[Mapping[str, str]]

    @property
    def teacher_top_k(self) -> int | None:
        """How many of the teacher's most likely tokens the objective needs at each position; None if none."""
        return None

    @property
    def reads_data(self) -> bool:
        """Whether the rows of `train.data` are trained on; an objective that trains on rollouts alone reads none."""
        return True

    @abstractmethod
    def criterion(self, targets_s: "Tensor", teacher: TopK | None) -> Criterion:
        """The loss of one batch. targets_s: int64, the rows' own tokens. teacher: None without `teacher_top_k`."""
