"""Distill: move reasoning from a DeepSeek-R1-family teacher into a dense student."""

__version__ = "0.1.0"
