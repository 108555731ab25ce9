"""The training loop: one optimiser step that fits on a screen.

Why not `transformers.Trainer`: its resume replays the data loader, its loss averages means unless the model cooperates,
and half of it is options that this project does not have. The useful parts of it are Accelerate's: devices, DDP,
trackers.

Everything that can be a pure function of the step number is one: the rows (`rows.feed`) and the learning rate
(`schedule`). A checkpoint then holds weights, optimiser, random states and counters, and a resumed run equals an
uninterrupted one bit for bit on a CPU.

Losses and gradient norms stay on the device until a line is logged, a checkpoint is written, or a second has passed, so
that fast steps on a GPU are not synchronised one by one and slow ones show their loss. A loss that is not finite is
therefore noticed a few steps late, but before a checkpoint, and with the rows of its step. A loss that jumps only
causes a warning, because some losses recover.
"""

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from distill.artefacts import TrainSummary
from distill.console import progress, say
from distill.errors import WorkError
from distill.recipe import Train
from distill.train.learn.learner import Learner
from distill.train.ranks.checkpoint import Checkpoints, Step
from distill.train.ranks.tensors import State
from distill.train.ranks.world import World, whole
from distill.train.rows import gate
from distill.train.rows.batches import collate
from distill.train.rows.feed import Feed, Figures
from distill.train.student import methods

RECENT = 32  # steps in the median that a jump of the loss is compared with
JUMP = 2.0  # a jump is this many times the median,
JUMP_NATS = 1.0  # and this many nats above it
SHOW_SECONDS = 1.0  # the longest time between two losses that are shown


def schedule(settings: Train, step: int, total: int) -> float:
    """The learning rate of optimiser step `step` (from 0) as a share of the peak: linear warm-up, then decay."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    match settings.lr_scheduler_type:
        case "constant":
            return 1.0
        case "linear":
            decay = 1 - done
        case "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr_rate + (1 - settings.min_lr_rate) * decay


class Loop:
    """One training: the learner and its optimiser laid out over the world, the data, and the position in it.

    laid_out: the learner as `World.lay_out` returned it, where the caller has done so. Restores the newest checkpoint.
    """

    def __init__(
        self,
        learner: Learner,
        feed: Feed,
        settings: Train,
        checkpoints: Checkpoints,
        world: World,
        laid_out: nn.Module | None = None,
    ) -> None:
        self.settings, self.checkpoints, self.feed, self.world = settings, checkpoints, feed, world
        self.learner = learner
        self.wrapped = laid_out or world.lay_out(learner, [], torch.float32)
        self.wrapped.train()
        self.parts = tuple(learner.objective.parts)
        self.optimizer = methods.optimizer(learner, settings)
        self.trained = [p for p in learner.parameters() if p.requires_grad]
        self.total = feed.total
        self.state = State(learner, self.optimizer, world.rank, world.size)
        self.position = checkpoints.restore(self.state)
        feed.restore(self.position.feed)
        self.logged_at = (self.position.tokens, self.position.seconds)
        self.pending: list[tuple[Tensor, Tensor, int]] = []  # as `Position.window`, of this rank, on the device

    def run(self) -> None:
        """Train to the end. An interruption (SIGINT or SIGTERM) takes effect after the step, and saves first.

        Errors: WorkError when a loss is not finite or the disk is full; KeyboardInterrupt.
        """
        at = self.position
        if at.step == self.total:
            self.say(f"step {at.step} of {self.total} was the last: the student is written from its checkpoint")
            return
        if at.step:
            self.say(f"resuming at step {at.step} of {self.total}")
        try:
            with interrupts() as interrupted, self.bar() as advance:
                self.steps(interrupted, advance)
        except KeyboardInterrupt:
            kept = self.checkpoints.newest()
            self.say(f"training interrupted after step {at.step}; {kept or 'nothing'} is saved")
            raise

    def steps(self, interrupted: Callable[[], bool], advance: Callable[[int, str], None]) -> None:
        """The steps that are left, with everything that is due after each."""
        settings, at = self.settings, self.position
        earlier, start = at.seconds, time.monotonic()
        shown, loss = start, ""
        while at.step < self.total:
            self.step()
            last = at.step == self.total
            stop, show = self.world.any_of(interrupted(), time.monotonic() - shown > SHOW_SECONDS)
            scored = self.evaluate() if self.due(settings.eval_steps) else None
            log, save = self.due(settings.logging_steps) or scored is not None, self.due(settings.save_steps) or stop
            if log or save or show:
                self.settle()
                shown, loss = time.monotonic(), f"loss {at.window[-1].parts[0]:.3f}"
                at.seconds = earlier + time.monotonic() - start
            advance(1, loss)
            if log:
                self.log(scored)
            if save:
                at.feed = self.feed.saved()
                self.checkpoints.save(self.state, at)
                if self.world.main:
                    self.feed.checkpointed()
            if stop and not last:
                raise KeyboardInterrupt

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.position.step == self.total or self.position.step % every == 0

    def step(self) -> None:
        """One optimiser step. The loss is the mean over its supervised tokens, independent of the split in batches.

        A step without rows changes no weight.
        """
        at = self.position
        batches = self.feed.step(at.step)
        rows = [row for batch in batches for row in batch]
        supervised = sum(row.supervised for row in rows)
        total = torch.zeros(len(self.parts), device=self.world.device)
        norm = total[0]
        if batches:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * schedule(self.settings, at.step, self.total)
            mine = self.world.share(batches)
            for number, (batch, counts) in enumerate(mine, 1):
                with self.world.accumulating(self.wrapped, last=number == len(mine)):
                    parts = self.wrapped(collate(batch).to(self.world.device)) / supervised
                    # Gradients are averaged over ranks; the loss needs their sum.
                    (parts[0] * (self.world.size if counts else 0)).backward()
                    total += parts.detach() * counts
            norm = whole(nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm))
            self.optimizer.step()
            self.optimizer.zero_grad()
        at.step += 1
        at.tokens += sum(len(row.ids) for row in rows)
        at.supervised_tokens += supervised
        self.pending.append((total, norm, supervised))

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """The mean loss over the supervised tokens of the held-out rows; None without such rows."""
        batches = self.feed.held_out()
        if not batches:
            return None
        total = torch.zeros(len(self.parts), device=self.world.device)
        self.wrapped.eval()
        for batch, counts in self.world.share(batches):
            total += self.wrapped(collate(batch).to(self.world.device)) * counts
        self.world.reshard(self.wrapped)
        self.wrapped.train()
        supervised = sum(row.supervised for batch in batches for row in batch)
        self.position.eval_loss = self.world.summed(total)[0].item() / supervised
        return self.position.eval_loss

    def settle(self) -> None:
        """Bring the pending losses to the host. Errors: WorkError naming step and rows when one is not finite."""
        if not self.pending:
            return
        parts = self.world.summed(torch.stack([parts for parts, *_ in self.pending])).tolist()
        norms = torch.stack([norm for _, norm, _ in self.pending]).tolist()
        first = self.position.step - len(self.pending)
        for number, (figures, norm) in enumerate(zip(parts, norms, strict=True), first):
            if not (math.isfinite(figures[0]) and math.isfinite(norm)):
                self.stop_at(number, figures[0], norm)
            if self.learner.objective.rollout_settings is None:  # a loss of rewards is near zero, and says little
                self.warn_of_jump(number, figures[0])
        supervised = [count for *_, count in self.pending]
        for number, (figures, norm, count) in enumerate(zip(parts, norms, supervised, strict=True), first):
            about = self.feed.after(number, dict(zip(self.parts, figures, strict=True)))
            self.position.window.append(Step(tuple(figures), norm, count, dict(about)))
        self.pending.clear()

    def stop_at(self, number: int, loss: float, norm: float) -> None:
        """End the training at a loss that is not finite. Errors: WorkError."""
        kept = self.checkpoints.newest()
        raise WorkError(
            f"step {number + 1}: loss {loss:g}, gradient norm {norm:g}, on the traces {self.names(number)}; the newest "
            f"checkpoint is {kept.name if kept else 'the base model'}: check these traces and the base's weights, or "
            f"lower train.learning_rate"
        )

    def warn_of_jump(self, number: int, loss: float) -> None:
        """Print a warning when a loss is far above the median of the last steps."""
        recent = self.position.recent
        if len(recent) == RECENT:
            median = statistics.median(recent)
            if loss > JUMP * median and loss > median + JUMP_NATS:
                self.say(
                    f"warning: step {number + 1}: loss {loss:.3f}, and the median before was {median:.3f}, on the "
                    f"traces {self.names(number)}; if it stays high, stop and lower train.learning_rate"
                )
        self.position.recent = [*recent[-(RECENT - 1) :], loss]

    def names(self, step: int) -> str:
        """The traces of a step, at most four of them by name."""
        keys = self.feed.keys(step)
        return ", ".join(gate.name(key) for key in keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    def log(self, eval_loss: float | None) -> None:
        """Write one line for the steps since the last one: the mean of each loss part over their supervised tokens."""
        at = self.position
        (tokens, seconds), self.logged_at = self.logged_at, (at.tokens, at.seconds)
        supervised = sum(step.supervised for step in at.window)
        means = [
            sum(step.parts[i] * step.supervised for step in at.window) / max(1, supervised)
            for i in range(len(self.parts))
        ]
        at.first_loss = means[0] if at.first_loss is None else at.first_loss
        at.last_loss = means[0]
        row: dict[str, JsonValue] = {
            "step": at.step,
            "epoch": self.feed.epoch(at.step),
            "loss": means[0],
            **{part: mean if supervised else None for part, mean in list(zip(self.parts, means, strict=True))[1:]},
            **averaged([step.figures or {} for step in at.window]),
            **({} if eval_loss is None else {"eval_loss": eval_loss}),
            "learning_rate": self.settings.learning_rate * schedule(self.settings, at.step - 1, self.total),
            "grad_norm": at.window[-1].norm,
            "tokens_per_second": round((at.tokens - tokens) / (at.seconds - seconds)),
            "tokens": at.tokens,
            "supervised_tokens": at.supervised_tokens,
        }
        at.window.clear()
        self.checkpoints.log(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self.world.accelerator.log(numbers, step=at.step)

    def summary(self) -> TrainSummary:
        """The summary of the stage at the current position."""
        at, counts = self.position, self.feed.counts
        assert at.first_loss is not None and at.last_loss is not None, "a training has at least one step"
        return TrainSummary(
            steps=at.step,
            epochs=self.feed.epoch(at.step),
            rows=counts.rows - counts.held_out_rows,
            held_out_rows=counts.held_out_rows,
            dropped_rows=counts.dropped_rows,
            dropped_tokens=counts.dropped_tokens,
            truncated_rows=counts.truncated_rows,
            truncated_tokens=counts.truncated_tokens,
            tokens=at.tokens,
            supervised_tokens=at.supervised_tokens,
            supervised_tokens_per_epoch=self.feed.supervised_per_epoch,
            first_loss=at.first_loss,
            last_loss=at.last_loss,
            eval_loss=at.eval_loss,
            seconds=round(at.seconds, 1),
            tokens_per_second=round(at.tokens / max(at.seconds, 1e-9)),
            processes=self.world.size,
            student="student",
            rollouts=self.feed.rollouts,
            rollout_tokens=self.feed.rollout_tokens,
        )

    def say(self, message: str) -> None:
        """Print a line, on the first rank."""
        if self.world.main:
            say(message)

    @contextmanager
    def bar(self) -> Iterator[Callable[[int, str], None]]:
        """The progress of the steps, on the first rank: yields `advance(steps, note)`."""
        if not self.world.main:
            yield lambda n, note: None
            return
        with progress("train", self.total, "steps", self.position.step) as advance:
            yield advance


def averaged(figures: Sequence[Figures]) -> dict[str, JsonValue]:
    """The mean of each figure over the steps that have it, place by place for lists; None where no step has it."""
    names = dict.fromkeys(name for step in figures for name in step)
    return {name: mean_of([step[name] for step in figures if name in step]) for name in names}


def mean_of(values: Sequence[JsonValue]) -> JsonValue:
    """The mean of numbers, or of lists of numbers place by place; None values are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], list):
        return [mean_of(place) for place in zip(*known, strict=True)]
    return statistics.fmean(known)  # type: ignore[arg-type]  # all are numbers


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGINT or SIGTERM has arrived: the running step is finished first. A second one interrupts at
    once."""
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
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
