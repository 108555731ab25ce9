"""A trace as the page shows it: its texts, cut where they are long, and what was decided about it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from distill.traces.trace import WORDS, Trace, Verdict

TEXT_SHOWN = 20_000  # characters of one text; an R1 trace may have ten times as many


@dataclass(frozen=True)
class Shown:
    """One trace in the page. verdict: a short word for it: "kept", a reason for dropping, a grade. length: of the
    completion, with its unit. evidence: (filter, reason, evidence) of its verdicts. reward: of a rollout, with its
    parts; None where it has none."""

    model: str
    verdict: str
    good: bool
    question: str
    gold: str | None
    reasoning: str | None
    response: str
    length: str
    evidence: list[tuple[str, str, str]] = field(default_factory=list)
    reward: str | None = None


def shown(model: str, verdict: str, good: bool, trace: Trace, verdicts: Iterable[Verdict] = ()) -> Shown:
    """A trace in the page. model, verdict, good: as in `Shown`. verdicts: of the filters."""
    return Shown(
        model=model,
        verdict=verdict,
        good=good,
        question=_cut(trace.prompt.messages[-1]["content"]),
        gold=trace.prompt.answer,
        reasoning=None if trace.reasoning is None else _cut(trace.reasoning),
        response=_cut(trace.text if trace.reasoning is None else trace.response),
        length=f"{trace.tokens:,} tokens" if trace.counted else f"{trace.length.value:,} {WORDS}, tokens not counted",
        evidence=[(verdict.filter, verdict.reason, _evidence(verdict.evidence)) for verdict in verdicts],
    )


def _evidence(evidence: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_cut(str(value))}" for key, value in evidence.items() if value is not None)


def _cut(text: str) -> str:
    """Long texts keep their beginning and, where the answer is, their end."""
    if len(text) <= TEXT_SHOWN:
        return text
    half = TEXT_SHOWN // 2
    return f"{text[:half]}\n\n[… {len(text) - TEXT_SHOWN:,} characters left out …]\n\n{text[-half:]}"
