"""What a judge model is asked, and which of its verdicts accept an answer.

A room of its own, below the filters and the recipe, which both have rubrics.
"""

from pydantic import Field, model_validator

from distill.recipe.template import placeholders
from distill.section import Section

QUESTION, GOLD, RESPONSE = "question", "answer", "response"  # the names in a judge's prompt


class Rubric(Section):
    """The prompt of a judge, and how its verdicts are spelled."""

    prompt: str = Field(
        description="text that the judge is asked: {{question}} is the question, {{answer}} the gold answer and "
        "{{response}} the response without its reasoning"
    )
    accepted: tuple[str, ...] = Field(
        ("yes", "correct", "true", "right", "equivalent", "pass", "A"),
        description="verdicts that accept a response, in any case",
    )
    rejected: tuple[str, ...] = Field(
        (
            "no",
            "incorrect",
            "false",
            "wrong",
            "not equivalent",
            "not correct",
            "not attempted",
            "fail",
            "B",
            "C",
        ),
        description="verdicts that reject it; any other text is no verdict",
    )
    min_score: float | None = Field(
        None, description="score from which on a response is accepted; null: verdicts are words, not scores"
    )
    max_characters: int = Field(
        100_000, ge=1, description="longest response that is judged; a longer one is unverifiable, and costs nothing"
    )

    @property
    def needs_gold(self) -> bool:
        """Whether the judge compares with a gold answer."""
        return GOLD in placeholders(self.prompt)

    @model_validator(mode="after")
    def can_be_asked(self) -> "Rubric":
        """Errors: ValueError for a prompt without the response or with unknown names, and for a word of both kinds."""
        names = placeholders(self.prompt)
        if RESPONSE not in names:
            raise ValueError("prompt has no {{response}}: every response would get the same verdict")
        if unknown := [name for name in names if name not in (QUESTION, GOLD, RESPONSE)]:
            raise ValueError(
                f"prompt has {{{{{unknown[0]}}}}}; known are {{{{question}}}}, {{{{answer}}}}, {{{{response}}}}"
            )
        if both := {word.lower() for word in self.accepted} & {word.lower() for word in self.rejected}:
            raise ValueError(f"accepted and rejected both have {sorted(both)[0]!r}")
        if not self.accepted and self.min_score is None:
            raise ValueError("accepted is empty: every response would be rejected")
        return self
