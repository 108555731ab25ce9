"""Where problems come from: Hugging Face datasets, JSONL and Parquet files, procedural generators.

Importing this package needs the standard library only; pyarrow and datasets are imported when a source needs them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from distill.prompts.prompt import Message, Prompt, Task

if TYPE_CHECKING:
    from distill.recipe.sources import ProceduralPrompts, PromptSource

__all__ = ["Message", "Prompt", "Task", "load_prompts"]


def load_prompts(sources: "Sequence[PromptSource]", seen: Counter[str] | None = None) -> Iterator[Prompt]:
    """Every prompt of the sources in their order, each once: the same question with the same answer is one prompt.

    seen: counts how often each prompt id was read, so `seen.total() - len(seen)` duplicates were passed over.
    Errors: UserError naming file and line when a source cannot be read; lazily, so take the whole list before writing.
    """
    seen = Counter() if seen is None else seen
    for source in sources:
        for prompt in _read(source):
            seen[prompt.id] += 1
            if seen[prompt.id] == 1:
                yield prompt


def _read(source: "PromptSource") -> Iterator[Prompt]:
    match source.kind:
        case "procedural":
            return _procedural(source)
        case "file":
            from distill.prompts.files import read_file

            return read_file(source)
        case "hub":
            from distill.prompts.hub import read_hub

            return read_hub(source)


def _procedural(source: "ProceduralPrompts") -> Iterator[Prompt]:
    from distill.prompts.arithmetic import problems

    for problem in problems(source.split, source.seed, source.limit):
        yield Prompt.from_question(problem.question, problem.answer, "math", f"arithmetic/{source.split}")
