"""Stage 2: which traces are worth learning from. One file a filter, `pipeline.py` for all of them."""

from distill.filters.pipeline import check_recipe, filter_traces

__all__ = ["check_recipe", "filter_traces"]
