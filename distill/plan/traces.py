"""How many traces generation makes, and how long they are: from stored ones, else as given, else assumed.

Which stored traces count is a question of how they were chosen. `distill generate` has many requests under way, and the
short answers are stored first: after an interruption the stored traces are shorter than the rest will be (0.45 of the
truth, with 64 requests at once). Only a choice that does not depend on the length is a fair sample:

    all samples of all prompts       the total itself, without an interval's width
    those of the pilots              drawn by the seed before any was sampled, and complete. `plan.json` keeps their
                                     prompts, so they stay a sample with an interval when generation goes on
    anything else                    no interval, and the output says that more is to be expected

Prompts of an interrupted pilot are of the last kind until another `--pilot` completes them.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill import generate
from distill.artefacts import RunPaths
from distill.console import counted
from distill.fingerprint import digest
from distill.plan.lengths import expected_tokens
from distill.plan.training import ASSUMED_SHARE, ASSUMED_TRACES
from distill.planned import Expected, Pilot
from distill.prompts import Prompt
from distill.run import Run
from distill.traces.store import TraceStore

if TYPE_CHECKING:
    from distill.recipe import Recipe

BIASED = ", which were not drawn at random: the first to finish are short, so expect more"


@dataclass(frozen=True)
class Traces:
    """The traces that generation will make. tokens: of completions. basis: what the estimate comes from. disk: bytes
    per trace, None where none is stored. truncated: share of those of the estimate that end at
    max_new_tokens."""

    prompts: int
    samples: int
    tokens: Expected
    basis: str
    disk: float | None = None
    truncated: float | None = None

    @property
    def count(self) -> int:
        """Prompts × samples."""
        return self.prompts * self.samples

    @property
    def mean(self) -> float:
        """Completion tokens per trace."""
        return self.tokens.value / max(self.count, 1)


def estimate_traces(
    recipe: "Recipe",
    directory: Path,
    prompts: list[Prompt] | None,
    traces: int | None,
    mean: int | None,
    pilot: Pilot | None,
) -> Traces:
    """Number and tokens of the traces: from stored ones, else as given, else assumed. Errors: UserError where the
    stored ones were sampled with other settings."""
    samples, assumed = (1 if recipe.traces else recipe.generate.samples), []
    limits = [getattr(source, "limit", None) for source in (*recipe.prompts, *recipe.traces)]
    paths, longest = RunPaths(directory), recipe.generate.sampling.max_new_tokens
    copied = recipe.traces and not TraceStore(paths.traces).is_empty()
    if traces is not None:
        number = -(-traces // samples)
    elif copied:
        lengths = [figures.tokens for figures in TraceStore(paths.traces).figures()]
        number = len(lengths)
        if mean is None and all(lengths):
            basis = counted(number, "copied trace")
            return Traces(number, samples, Expected(value=sum(lengths)), basis, bytes_of(paths.traces) / number)
    elif prompts is not None:
        number = len(prompts)
    elif limits and all(limits):
        number = sum(limit for limit in limits if limit)
        number = min(number, (recipe.generate.max_prompts if recipe.prompts else None) or number)
    elif recipe.prompts and recipe.generate.max_prompts:
        number = recipe.generate.max_prompts
    else:
        number = ASSUMED_TRACES // samples
        assumed.append("the number of traces (--traces)")
    if mean is None and prompts is not None and not TraceStore(paths.traces).is_empty():
        Run(directory, recipe).refuse_other_settings("generate", generate.STAGE.recipe_settings(recipe))
        stored = _stored(recipe, paths, prompts, number, pilot)
        if stored is not None:
            return stored
        assumed.append("the length, as the stored traces have no token counts (--mean-tokens)")
    elif mean is None:
        assumed.append("the length (--mean-tokens)")
    tokens = number * samples * (round(ASSUMED_SHARE * longest) if mean is None else mean)
    asked = not recipe.traces and recipe.reads_traces  # a teacher that a pilot could measure
    basis = f"{' and '.join(assumed)} assumed; --pilot 8 measures it" if assumed else "as given"
    return Traces(number, samples, Expected(value=tokens), basis if asked else basis.partition(";")[0])


def pilot_of(recipe: "Recipe", prompts: list[Prompt], count: int) -> Pilot:
    """A finished pilot of `count` prompts."""
    drawn = generate.pilot_prompts(recipe.seed, prompts, count)
    ids = tuple(prompt.id for prompt in drawn)
    return Pilot(prompts=ids, samples=recipe.generate.samples, population=_population(prompts))


def _population(prompts: list[Prompt]) -> str:
    return digest([prompt.id for prompt in prompts])


def _stored(
    recipe: "Recipe", paths: RunPaths, prompts: list[Prompt], number: int, pilot: Pilot | None
) -> Traces | None:
    samples, wanted = recipe.generate.samples, {prompt.id for prompt in prompts}
    tokens: dict[str, dict[int, int]] = defaultdict(dict)  # prompt → sample → completion tokens
    truncated, stored = set[tuple[str, int]](), 0
    for figures in TraceStore(paths.traces).figures():
        stored += 1
        if figures.key[0] in wanted and figures.tokens:
            prompt, sample = figures.key
            tokens[prompt][sample] = figures.tokens
            if figures.finish_reason == "length":
                truncated.add(figures.key)
    if not tokens:
        return None
    complete = [prompt for prompt, lengths in tokens.items() if len(lengths) >= samples]
    chosen = {prompt: tokens[prompt] for prompt in complete or tokens}
    drawn = _of_pilot(tokens, pilot if pilot and pilot.population == _population(prompts) else None)
    note = ""
    if len(complete) < number:
        chosen, note = (drawn, ", the pilot's") if drawn else (chosen, BIASED)
    lengths = [list(of_prompt.values()) for of_prompt in chosen.values()]
    expected = expected_tokens(lengths, number, samples, recipe.generate.sampling.max_new_tokens)
    if note == BIASED:
        expected = Expected(value=expected.value)
    count = sum(map(len, lengths))
    cut = sum((prompt, sample) in truncated for prompt, of_prompt in chosen.items() for sample in of_prompt)
    basis = f"{counted(count, 'stored trace')} of {counted(len(chosen), 'prompt')}{note}"
    return Traces(number, samples, expected, basis, bytes_of(paths.traces) / stored, cut / count)


def bytes_of(traces: Path) -> int:
    """Bytes of the files of a directory."""
    return sum(path.stat().st_size for path in traces.iterdir() if path.is_file())


def _of_pilot(tokens: dict[str, dict[int, int]], pilot: Pilot | None) -> dict[str, dict[int, int]] | None:
    """The lengths of the pilot's samples; None where there was no pilot, or a sample of it is missing."""
    if pilot is None:
        return None
    wanted = range(pilot.samples)
    if not all(sample in tokens.get(prompt, ()) for prompt in pilot.prompts for sample in wanted):
        return None
    return {prompt: {sample: tokens[prompt][sample] for sample in wanted} for prompt in pilot.prompts}
