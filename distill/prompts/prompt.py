"""The Prompt: a question, its task, and what a grader needs to know of the answer.

Plain dataclasses, no pydantic: the maintainers' tools import the procedural generators on machines that have only
torch. The id is a hash of the content, so the same question read from two files is the same prompt, and a ledger stays
valid when files are reordered.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Task = Literal["math", "code", "choice", "chat"]


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One question. `answer` is the gold answer as text (None when unknown); `source` says where it came from."""

    messages: tuple[Message, ...]
    task: Task = "math"
    answer: str | None = None
    source: str = ""
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_hash(self.messages, self.task, self.answer))

    @classmethod
    def from_question(cls, question: str, answer: str | None, task: Task = "math", source: str = "") -> "Prompt":
        return cls(({"role": "user", "content": question},), task, answer, source)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "messages": [dict(m) for m in self.messages],
            "task": self.task,
            "answer": self.answer,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Prompt":
        messages: tuple[Message, ...] = tuple({"role": m["role"], "content": m["content"]} for m in row["messages"])
        return cls(messages, row["task"], row["answer"], row["source"], row["id"])


def content_hash(messages: tuple[Message, ...], task: str, answer: str | None) -> str:
    """16 hex digits (64 bits) of SHA-256 over the canonical JSON of what makes the prompt itself."""
    content = [[[m["role"], m["content"]] for m in messages], task, answer]
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
