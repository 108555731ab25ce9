"""Stage 3: the student is fine-tuned, once or in phases, after a proof that the rows are the intended ones."""

from distill.train.phases import PhasesStage, follow
from distill.train.ranks.environment import several
from distill.train.stage import STAGE

__all__ = ["STAGE", "PhasesStage", "follow", "several"]
