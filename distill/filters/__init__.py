"""Stage 2: which traces are worth learning from. One file a filter, `pipeline.py` for all of them."""

from distill.filters.pipeline import STAGE, check_gradable

__all__ = ["STAGE", "check_gradable"]
