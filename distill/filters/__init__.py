"""Stage 2: which traces are worth learning from. One file a filter, `pipeline.py` for all of them."""

from distill.filters.pipeline import check_gradable, filter_traces, is_finished

__all__ = ["check_gradable", "filter_traces", "is_finished"]
