"""Distill: move reasoning from a DeepSeek-R1-family teacher into a dense student.

The names of `__all__` are the Python API; they live in `distill.api` and are imported on first use, so that
`import distill` loads neither torch nor pydantic.
"""

import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distill.api import Run, grade, load_recipe, open_model

__all__ = ["Run", "__version__", "grade", "load_recipe", "open_model"]


# transformers imports torchao where it is installed, and torchao then warns of compiled extensions for other versions
# of torch, which training in float8 does not use.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    """Import a name of the API when it is first used. Errors: AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    from distill import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the API, for completion in a notebook."""
    return sorted(__all__)
