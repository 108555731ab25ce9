"""Traces: the record, its crash-safe store, other people's formats."""

from distill.traces.trace import Trace, Verdict

__all__ = ["Trace", "Verdict"]
