"""Where problems come from: Hugging Face datasets, JSONL and Parquet files, procedural generators.

Importing this package needs the standard library only; pyarrow and datasets are imported when a source needs them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from distill.prompts.files import PromptCounts
from distill.prompts.prompt import Message, Prompt, Task

if TYPE_CHECKING:
    from distill.recipe.sources import ProceduralPrompts, PromptSource

__all__ = ["Message", "Prompt", "PromptCounts", "Task", "load_prompts"]


def load_prompts(sources: "Sequence[PromptSource]", counts: PromptCounts | None = None) -> Iterator[Prompt]:
    """Every prompt of the sources in their order, each once: the same question with the same answer is one prompt.

    counts: filled with what was read, duplicates and missing answers among it; complete when the iterator is at its
    end. Errors: UserError naming file and line when a source cannot be read; lazily, so take the whole list before
    writing.
    """
    counts = PromptCounts() if counts is None else counts
    for source in sources:
        for prompt in _read(source, counts):
            counts.seen[prompt.id] += 1
            if counts.seen[prompt.id] == 1:
                yield prompt


def _read(source: "PromptSource", counts: PromptCounts) -> Iterator[Prompt]:
    match source.kind:
        case "procedural":
            return _procedural(source)
        case "file":
            from distill.prompts.files import read_file

            return read_file(source, counts)
        case "hub":
            from distill.prompts.hub import read_hub

            return read_hub(source, counts)


def _procedural(source: "ProceduralPrompts") -> Iterator[Prompt]:
    from distill.prompts.arithmetic import problems

    for problem in problems(source.split, source.seed, source.limit):
        yield Prompt.from_question(problem.question, problem.answer, "math", f"arithmetic/{source.split}")
