"""The traces of a teacher without think tags, divided into reasoning and response by a rule.

A model that was not trained to reason apart writes its steps and then a sentence with the answer. The rule: **the
response begins with the paragraph of the last `\\boxed{…}`; where that is the first paragraph, with its line.** What
stands before is the reasoning, which is put between the tags. Paragraphs are separated by blank lines. A text without
a box, or with nothing before the line of the box, is not divided.

Rejected: dividing at phrases such as "the answer is", which stand inside reasoning too, and falling back to the last
paragraph where there is no box: a text that was cut off would become a reasoning with an answer.
"""

import re
from dataclasses import replace

from distill.prompts.boxes import last_box_start
from distill.prompts.prompt import END_THINK, THINK
from distill.traces.trace import Trace

PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


def divided(text: str) -> tuple[str, str] | None:
    """(reasoning, response) of a text without think tags, by the rule above, both stripped; None where it is not
    divided."""
    start = last_box_start(text)
    if start is None:
        return None
    before = text[:start]
    breaks = [match.end() for match in PARAGRAPH.finditer(before) if before[: match.start()].strip()]
    lines = [at + 1 for at, character in enumerate(before) if character == "\n" and before[:at].strip()]
    if not (places := breaks or lines):
        return None
    return text[: places[-1]].strip(), text[places[-1] :].strip()


def wrapped(trace: Trace) -> Trace | None:
    """The trace with its reasoning between think tags; itself where it has such a block. None: it is not divided.

    The tokens of a wrapped trace are those of another text, so it has none.
    """
    if trace.reasoning is not None:
        return trace
    parts = None if THINK in trace.text or END_THINK in trace.text else divided(trace.text)
    if parts is None:
        return None
    reasoning, response = parts
    text = f"{THINK}\n{reasoning}\n{END_THINK}\n\n{response}"
    return replace(
        trace,
        text=text,
        reasoning=reasoning,
        response=response,
        completion_token_ids=(),
        completion_tokens=None,
        logprobs=None,
        top_logprobs=None,
    )
