"""Stage 3: the student is fine-tuned on the kept traces, and proved fit for them before."""

from distill.train.stage import STAGE, follow, kept_hash, several

__all__ = ["STAGE", "follow", "kept_hash", "several"]
