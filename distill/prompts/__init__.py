"""Where problems come from: Hugging Face datasets, files, procedural generators, and mixtures of them.

Importing this package needs the standard library only; pyarrow and datasets are imported when a source needs them.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from distill.prompts.counts import PromptCounts
from distill.prompts.prompt import Message, Prompt, Task
from distill.prompts.selection import interleaved

if TYPE_CHECKING:
    from distill.recipe.sources import ProceduralPrompts, PromptSource

__all__ = ["Message", "Prompt", "PromptCounts", "Task", "load_prompts"]


def load_prompts(
    sources: "Sequence[PromptSource]", counts: PromptCounts | None = None, limit: int | None = None
) -> Iterator[Prompt]:
    """The prompts of the sources, each once: the same question with the same answer is one prompt.

    In the order of the sources; where one has a weight, interleaved in proportion to the weights. counts: filled with
    what was read, duplicates and missing answers among it; complete when the iterator is at its end. limit: number of
    prompts. Errors: UserError naming file and line when a source cannot be read; lazily, so take the whole list before
    writing.
    """
    counts = PromptCounts() if counts is None else counts
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights):
        return islice(_mixture(sources, [1.0 if weight is None else weight for weight in weights], counts), limit)
    return islice((prompt for source in sources for prompt in _read(source, counts) if counts.add(prompt)), limit)


def _mixture(sources: "Sequence[PromptSource]", weights: list[float], counts: PromptCounts) -> Iterator[Prompt]:
    ended = yield from interleaved([_read(source, counts) for source in sources], weights, counts.add)
    counts.ended = (
        f"the mixture ends after {len(counts.seen):,} prompts: prompts.{ended} (weight {weights[ended]:g}) has no more"
        f"; raise its limit, or lower its weight"
    )


def _read(source: "PromptSource", counts: PromptCounts) -> Iterator[Prompt]:
    match source.kind:
        case "procedural":
            return _procedural(source)
        case "reasoning_gym":
            from distill.prompts.gym import read_gym

            return read_gym(source.name, source.config, source.seed, source.limit)
        case "file":
            from distill.prompts.files import read_file

            return read_file(source, counts)
        case "hub":
            from distill.prompts.files import read_hub

            return read_hub(source, counts)


def _procedural(source: "ProceduralPrompts") -> Iterator[Prompt]:
    from distill.prompts.arithmetic import problems

    for problem in problems(source.split, source.seed, source.limit):
        yield Prompt.from_question(problem.question, problem.answer, "math", f"arithmetic/{source.split}")
