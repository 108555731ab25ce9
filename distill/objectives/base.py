"""What an objective provides to the training.

Shapes: s supervised tokens of a batch, r of them in a block, k teacher tokens per position, v vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from distill.objectives.rollout_settings import RolloutSettings
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


class Sampled(NamedTuple):
    """The student's own tokens: one entry per supervised token of a batch, float32 [s].

    logprobs_s: natural log-probability under the model that sampled the token (the engine), at temperature 1.
    advantages_s: the row's advantage, times the row's weight in the loss; 0 for objectives without rewards.
    reference_s: log-probability under the base of the training; 0 where the objective does not ask for it.
    own_s: 1 where the student wrote the token, 0 in a row of the teacher's, where the other three are not read.
    """

    logprobs_s: "Tensor"
    advantages_s: "Tensor"
    reference_s: "Tensor"
    own_s: "Tensor"


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
    def rollout_settings(self) -> RolloutSettings | None:
        """How the student samples the rows it is trained on; None if the rows are the teacher's traces."""
        return None

    @property
    def reads_data(self) -> bool:
        """Whether rows of `train.data` are trained on, beside or in place of the student's own."""
        return self.rollout_settings is None

    @property
    def task_teachers(self) -> Mapping[str, str]:
        """Names of further teachers, by the task of the prompts that they score."""
        return {}

    @property
    def needs_reference(self) -> bool:
        """Whether `Sampled.reference_s` is read."""
        return False

    @abstractmethod
    def criterion(self, targets_s: "Tensor", teacher: TopK | None, sampled: Sampled | None = None) -> Criterion:
        """The loss of one batch. targets_s: int64, the rows' own tokens. teacher: None without `teacher_top_k`.

        sampled: None without `rollout_settings`, and for rows that the student did not write.
        """
