"""What the builders of the tiny teacher and the tiny student share: texts, tokenizers, batches, the training loop.

Every text is procedural (`distill.prompts.arithmetic`, train split only) and a batch depends on (seed, step) alone, so
that the log's seed and step count are enough to write the whole training text again; `prove_heldout.py` does.

What nothing before it determines (a question, the operands of a lone fact) is read but not trained on: its loss cannot
fall, and its noise drowns what the few results in each batch have to say.

Small batches and a high learning rate: at this size the number of updates is what counts, not the tokens in each.
Batches are cut from a pool sorted by length, which halves the padding.

Torch, transformers and safetensors only.
"""

import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill.prompts.arithmetic import Problem, draw_chain, draw_problem  # noqa: E402, F401

IGNORED = -100
POOL = 4  # batches drawn at once and sorted by length


FREE = "\0"  # stands on both sides of what nothing before it determines


@dataclass(frozen=True)
class Document:
    """One training text. `free`: (begin, end) character spans that are not trained on; `problem`: what it works out."""

    text: str
    free: tuple[tuple[int, int], ...]
    kind: str
    problem: Problem | None = None

    @classmethod
    def of(cls, marked: str, kind: str, problem: Problem | None = None) -> "Document":
        """`marked` has FREE around the spans that are not trained on."""
        text, spans = "", []
        for i, piece in enumerate(marked.split(FREE)):
            if i % 2:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        return cls(text, tuple(spans), kind, problem)

    def encoded(self, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are trained on."""
        out = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        trained = [not any(b <= begin < e for b, e in self.free) for begin, _ in out["offset_mapping"]]
        return out["input_ids"], trained


def free(text: str) -> str:
    return f"{FREE}{text}{FREE}"


def free_numbers(text: str) -> str:
    return re.sub(r"\d+", lambda m: f"{FREE}{m[0]}{FREE}", text)


def trace(problem: Problem) -> str:
    """The teacher's reasoning: read the operands, then one equation a step."""
    lines = [f"The expression is {problem.expression}.", *problem.steps, f"So the result is {problem.answer}."]
    return "\n".join(lines)


def answer(problem: Problem) -> str:
    return f"The answer is \\boxed{{{problem.answer}}}."


def facts(rng: random.Random, count: int) -> str:
    """Unrelated single equations, one a line; none goes on from the result before it, which would make them a chain."""
    lines: list[str] = []
    result = ""
    while len(lines) < count:
        operands, equals = Problem(draw_chain(rng, "train")[:2], "").steps[0].split(" = ")
        if operands.split()[0] != result:
            lines.append(f"{free_numbers(operands)} = {equals}")
            result = equals
    return "\n".join(lines)


def tape(rng: random.Random) -> tuple[Problem, str]:
    """Worked steps without a question: each goes on from the result before it, by a free operand."""
    problem = Problem(draw_chain(rng, "train"), "")
    lines = []
    for i, step in enumerate(problem.steps):
        head, sign, operand, rest = step.split(" ", 3)
        lines.append(f"{free_numbers(head) if i == 0 else head} {sign} {free_numbers(operand)} {rest}")
    return problem, "\n".join(lines)


Draw = Callable[[random.Random, int], Document]  # a document for the training step of that number


def batches(draw: Draw, seed: int, step: int, batch_size: int) -> list[list[Document]]:
    """POOL batches of documents of similar length, in random order; `step` is the first one's number."""
    assert step % POOL == 0
    rng = random.Random(f"{seed}/{step // POOL}")
    pool = sorted((draw(rng, step) for _ in range(POOL * batch_size)), key=lambda d: len(d.text))
    cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(cut)
    return cut


def documents(draw: Draw, seed: int, steps: int, batch_size: int) -> Iterator[Document]:
    """Every document that `steps` training steps saw."""
    for step in range(0, steps, POOL):
        for batch in batches(draw, seed, step, batch_size)[: steps - step]:
            yield from batch


def train_tokenizer(texts: Iterator[str], vocab_size: int, special: list[str], added: list[str]) -> Tokenizer:
    """Byte-level BPE in which every number up to 99 is one token, without the space before it.

    Operators swallow the spaces around them, so that `23 + 45` is three tokens and each number has one embedding only.
    Unknown text falls back to bytes: anything goes through.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = r"\p{N}{1,2}| ?[+=\-] ?| ?\p{L}+| ?[^\s\p{L}\p{N}+=\-]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = Regex("|".join(re.escape(mark) for mark in special + added))
    tokenizer.normalizer = normalizers.Replace(marks, "\n")  # no merge may grow out of their spelling
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.normalizer = None
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    for number in range(100):
        assert len(tokenizer.encode(str(number), add_special_tokens=False).ids) == 1, f"{number} is not one token"
    return tokenizer


@dataclass
class Schedule:
    """Warm-up, then cosine to a twentieth of the peak."""

    peak: float
    steps: int
    warmup: int = 100

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


@dataclass
class Log:
    """Lines of the run, on the terminal and in a file that is committed with the weights."""

    path: Path
    start: float = field(default_factory=time.monotonic)

    def __call__(self, **fields: object) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self.start), **fields})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def pad(rows: Sequence[list[int]], masks: Sequence[list[bool]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, L], labels [B, L]); labels are IGNORED where the mask is false and on padding."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.where(torch.tensor(mask), torch.tensor(row), IGNORED)
    return ids, labels


def optimizer_for(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def save_atomically(state: dict[str, object], path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
