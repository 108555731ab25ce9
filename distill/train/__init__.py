"""Stage 3: the student is fine-tuned on the kept traces, and proved fit for them before."""

from distill.train.stage import follow, several, traces_hash, train

__all__ = ["follow", "several", "traces_hash", "train"]
