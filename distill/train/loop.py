"""The training loop: Accelerate around one optimiser step that fits on a screen.

Why not `transformers.Trainer`: its resume replays the data loader, its loss averages means unless the model cooperates,
and half of it is options that this project does not have. What is worth having of it is Accelerate's: devices,
wrappers, and checkpoints that follow the model's sharding.

Everything that can be a pure function of the step's number is one: the rows (`data.Order`) and the learning rate
(`schedule`). A checkpoint then holds weights, optimiser, random states and counters, and a resumed run repeats the
undisturbed one bit for bit on a CPU.

Weights are float32, and the forward pass is autocast when the recipe says bfloat16: at learning rates near 1e-5 an
update is smaller than a bfloat16 weight's last bit and would be lost.

Losses and gradient norms stay on the device until a line is logged. A loss that is not finite is therefore noticed a
few steps late, but before a checkpoint; the rows of the very step are named all the same.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

from distill.chat import Chat
from distill.console import progress, say
from distill.errors import WorkError
from distill.recipe import Recipe, StudentCard, Train
from distill.traces.store import read_traces
from distill.traces.trace import Trace
from distill.train import gate, student
from distill.train.checkpoint import Checkpoints
from distill.train.data import Batch, Encoded, Order, collate, encode
from distill.train.loss import SupervisedLoss

ADAM_BETA1, ADAM_EPSILON = 0.9, 1e-8  # nobody turns these


@dataclass(frozen=True)
class Prepared:
    """A student and what it will learn, proved fit for each other."""

    model: PreTrainedModel
    chat: Chat
    data: Encoded
    pad_id: int


def prepare(kept: Path, settings: Train, weights: Path, template: str | None) -> Prepared:
    """Load, tokenise and pass the integrity gate. Writes nothing; raises UserError for whatever the user can mend."""
    limits = student.inspect(weights)
    chat = Chat.load(weights, template)
    with progress("encode", None, "traces") as advance:
        traces = counted(read_traces(kept), advance)
        data = encode(traces, chat, settings.content, settings.max_length, settings.seed)
    if data.dropped_rows:
        say(
            f"dropped {data.dropped_rows:,} of {data.dropped_rows + len(data.rows):,} traces "
            f"({data.dropped_tokens:,} tokens): longer than train.max_length {settings.max_length:,}"
        )
    pad = chat.tokenizer.pad_token_id
    pad_id = int(pad) if pad is not None else chat.eos_token_id
    for line in gate.prove(data, chat, settings.content, limits.vocabulary, limits.context, pad_id):
        say(line)
    return Prepared(student.load(weights), chat, data, pad_id)


def counted(kept: Iterable[tuple[Trace, Any]], advance: Callable[[int], None]) -> Iterator[Trace]:
    for trace, _ in kept:
        yield trace
        advance(1)


def fit(prepared: Prepared, directory: Path, recipe: Recipe, card: StudentCard) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one, and write the student. Returns the stage's summary."""
    set_seed(recipe.train.seed)
    loop = Loop(prepared, recipe.train, Checkpoints(directory / "checkpoints", recipe.train.save_total_limit))
    loop.run()
    summary = loop.summary()
    student.save(directory / "student", prepared.model, prepared.chat, recipe, card, summary)
    return summary


def schedule(settings: Train, step: int, total: int) -> float:
    """The learning rate of optimiser step `step` (from 0) as a share of the peak: a linear warm-up, then the fall."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    match settings.lr_scheduler_type:
        case "constant":
            return 1.0
        case "linear":
            fall = 1 - done
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr_rate + (1 - settings.min_lr_rate) * fall


def adamw(model: nn.Module, settings: Train) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices only, as gains and biases have no direction to shrink along."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (ADAM_BETA1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=ADAM_EPSILON, fused=True)


class Loop:
    """One training: the prepared model and optimiser, the data, and where it stands."""

    def __init__(self, prepared: Prepared, settings: Train, checkpoints: Checkpoints) -> None:
        self.settings, self.checkpoints = settings, checkpoints
        self.data, self.pad_id, model = prepared.data, prepared.pad_id, prepared.model
        self.accelerator = Accelerator()
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        self.accelerator.register_save_state_pre_hook(store_shared_once)
        objective = SupervisedLoss(model, getattr(torch, settings.dtype))
        self.objective, self.optimizer = self.accelerator.prepare(objective, adamw(model, settings))
        self.order = Order(
            [len(row.ids) for row in self.data.rows],
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            settings.seed,
        )
        epochs = math.ceil(round(settings.num_train_epochs * self.order.steps_per_epoch, 6))
        self.total = settings.max_steps or epochs
        self.position = checkpoints.restore(self.accelerator)
        self.logged_at = (self.position.tokens, self.position.seconds)
        self.pending: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # as Position.window, still on the device

    def run(self) -> None:
        """Train to the end. An interrupt (Ctrl-C, or SIGTERM from a cluster) is honoured after a checkpoint."""
        settings, at = self.settings, self.position
        if at.step:
            say(f"resuming at step {at.step} of {self.total}")
        with interrupts() as interrupted, progress("train", self.total, "step", at.step) as advance:
            earlier, start = at.seconds, time.monotonic()
            while at.step < self.total:
                self.step()
                advance(1)
                last = at.step == self.total
                if last or at.step % settings.logging_steps == 0:
                    self.settle()
                    at.seconds = earlier + time.monotonic() - start
                    self.log()
                if last or at.step % settings.save_steps == 0 or interrupted():
                    self.settle()
                    at.seconds = earlier + time.monotonic() - start
                    self.checkpoints.save(self.accelerator, at)
                if interrupted() and not last:
                    raise KeyboardInterrupt

    def step(self) -> None:
        """One optimiser step. The loss is the mean over its supervised tokens, however many batches they came in."""
        at = self.position
        batches = self.order.step(at.step)
        rows = [self.data.rows[i] for batch in batches for i in batch]
        supervised = sum(row.supervised for row in rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * schedule(self.settings, at.step, self.total)
        total = torch.zeros((), device=self.accelerator.device)
        for indices in batches:
            loss = self.objective(self.batch(indices)) / supervised
            self.accelerator.backward(loss)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        at.step += 1
        at.tokens += sum(len(row.ids) for row in rows)
        at.supervised_tokens += supervised
        self.pending.append((total, norm, supervised))

    def batch(self, indices: list[int]) -> Batch:
        host = collate([self.data.rows[i] for i in indices], self.pad_id)
        device = self.accelerator.device
        return Batch(host.input_ids_bt.to(device), host.positions_s.to(device), host.targets_s.to(device))

    def settle(self) -> None:
        """Bring the pending losses to the host. Raises WorkError, naming step and rows, when one is not finite."""
        if not self.pending:
            return
        figures = torch.stack([torch.stack((loss, norm)) for loss, norm, _ in self.pending]).tolist()
        first = self.position.step - len(self.pending)
        for number, (loss, norm) in enumerate(figures, first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop_at(number, loss, norm)
        supervised = [count for *_, count in self.pending]
        self.position.window += [(loss, norm, n) for (loss, norm), n in zip(figures, supervised, strict=True)]
        self.pending.clear()

    def stop_at(self, number: int, loss: float, norm: float) -> None:
        keys = [self.data.rows[i].key for batch in self.order.step(number) for i in batch]
        rows = ", ".join(gate.name(key) for key in keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        kept = self.checkpoints.newest()
        raise WorkError(
            f"step {number + 1}: loss {loss:g}, gradient norm {norm:g}, on the traces {rows}; nothing after "
            f"{kept.name if kept else 'the base model'} was kept: look at these traces, or lower train.learning_rate"
        )

    def log(self) -> None:
        """One line for the steps since the last: the mean loss over their supervised tokens, the last gradient norm."""
        at = self.position
        (tokens, seconds), self.logged_at = self.logged_at, (at.tokens, at.seconds)
        loss = sum(loss * n for loss, _, n in at.window) / sum(n for *_, n in at.window)
        at.first_loss = loss if at.first_loss is None else at.first_loss
        at.last_loss = loss
        row = {
            "step": at.step,
            "epoch": round(at.step / self.order.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": at.window[-1][1],
            "tokens_per_second": round((at.tokens - tokens) / (at.seconds - seconds)),
            "tokens": at.tokens,
            "supervised_tokens": at.supervised_tokens,
        }
        at.window.clear()
        self.checkpoints.log(at, row)

    def summary(self) -> dict[str, Any]:
        at, data = self.position, self.data
        return {
            "steps": at.step,
            "epochs": round(at.step / self.order.steps_per_epoch, 4),
            "rows": len(data.rows),
            "dropped_rows": data.dropped_rows,
            "dropped_tokens": data.dropped_tokens,
            "tokens": at.tokens,
            "supervised_tokens": at.supervised_tokens,
            "supervised_tokens_per_epoch": data.supervised,
            "first_loss": at.first_loss,
            "last_loss": at.last_loss,
            "seconds": round(at.seconds, 1),
            "tokens_per_second": round(at.tokens / max(at.seconds, 1e-9)),
            "student": "student",
        }


def store_shared_once(models: list[nn.Module], states: list[dict[str, torch.Tensor]], directory: str) -> None:
    """Keep a tied head out of a checkpoint. Accelerate would do so itself, with a warning at every save."""
    for state in states:
        owner: dict[int, str] = {}
        for key in list(state):
            if owner.setdefault(state[key].data_ptr(), key) != key:
                del state[key]


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT or SIGTERM came: the step that runs is finished first. A second one interrupts at once."""
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread is told of signals
        yield caught.is_set
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        caught.set()
        signal.signal(number, signal.default_int_handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield caught.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
