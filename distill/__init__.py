"""Distill: move reasoning from a DeepSeek-R1-family teacher into a dense student.

The names of `__all__` are the Python API; they live in `distill.api` and are imported on first use, so that
`import distill` loads neither torch nor pydantic.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distill.api import Run, grade, load_recipe, open_model

__all__ = ["Run", "__version__", "grade", "load_recipe", "open_model"]


def __getattr__(name: str) -> object:
    """Import a name of the API when it is first used. Errors: AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    from distill import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the API, for completion in a notebook."""
    return sorted(__all__)
