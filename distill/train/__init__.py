"""Stage 3: the student is fine-tuned on the kept traces, after a proof that the rows are the intended ones."""

from distill.train.ranks.environment import several
from distill.train.stage import STAGE, follow, kept_hash

__all__ = ["STAGE", "follow", "kept_hash", "several"]
