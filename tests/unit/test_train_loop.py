"""The optimiser step: loss and gradients against transformers' own, the schedule by hand, NaN, exact resuming."""

import json
import signal

import pytest
import torch
import train_support as support
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from distill.errors import WorkError
from distill.recipe import Train
from distill.train import loop as loop_module
from distill.train.checkpoint import Checkpoints
from distill.train.data import collate
from distill.train.loop import Loop, adamw, prepare, schedule
from distill.train.loss import SupervisedLoss


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return support.prepare(tmp_path_factory.mktemp("run"), support.sums(24))


def prepared(student, run_dir, recipe):
    return prepare(run_dir / "filtered" / "kept", recipe.train, student, "chatml")


def make_loop(student, run_dir, directory, **settings):
    recipe = support.make_recipe(student, settings)
    checkpoints = Checkpoints(directory, recipe.train.save_total_limit)
    return Loop(prepared(student, run_dir, recipe), recipe.train, checkpoints)


def logged(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def losses(directory):
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in logged(directory)]


def test_loss_and_gradients_are_those_of_transformers_with_an_attention_mask_and_labels(student, run_dir):
    data = prepared(student, run_dir, support.make_recipe(student)).data
    rows = data.rows[:6]
    batch = collate(rows, 257)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32) for _ in range(2))

    loss = SupervisedLoss(ours, torch.float32)(batch)
    loss.backward()

    mask_bt = torch.zeros_like(batch.input_ids_bt)
    labels_bt = torch.full_like(batch.input_ids_bt, -100)
    for b, row in enumerate(rows):
        mask_bt[b, : len(row.ids)] = 1
        labels_bt[b, row.prompt_tokens : len(row.ids)] = torch.as_tensor(row.ids[row.prompt_tokens :])
    logits_btv = theirs(batch.input_ids_bt, attention_mask=mask_bt).logits
    reference = F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), labels_bt[:, 1:].flatten(), reduction="sum")
    reference.backward()

    assert len({len(row.ids) for row in rows}) > 1, "without padding the comparison is empty"
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        difference = (a.grad - b.grad).abs()
        assert difference.max() <= 1e-5 * b.grad.abs().max(), (
            f"{name}: {difference.max():.2e}, mean {difference.mean():.2e}"
        )


def test_any_split_of_a_step_into_batches_gives_the_same_training(student, tmp_path):
    run_dir = support.prepare(tmp_path / "run", support.sums(8))  # one step an epoch: the same rows whatever the split
    weights = []
    for batch_size, accumulation in ((8, 1), (2, 4), (3, 3)):
        loop = make_loop(
            student,
            run_dir,
            tmp_path / f"{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-4,
            max_steps=3,
            logging_steps=1,
        )
        loop.run()
        weights.append(torch.cat([p.detach().flatten() for p in loop.objective.parameters()]))
    reference, *others = (losses(tmp_path / name) for name in ("8", "2", "3"))
    for other in others:
        assert [row[1] for row in other] == pytest.approx([row[1] for row in reference], rel=1e-5)
        assert [row[2] for row in other] == pytest.approx([row[2] for row in reference], rel=1e-4)
    for other in weights[1:]:
        assert (other - weights[0]).abs().max() < 1e-5


def test_schedule_by_hand():
    def rates(total, **settings):
        return [round(schedule(Train(**settings), step, total), 4) for step in range(total)]

    assert rates(4, lr_scheduler_type="constant", warmup_ratio=0.5) == [0.5, 1, 1, 1]
    assert rates(5, lr_scheduler_type="linear", warmup_ratio=0.2, min_lr_rate=0.2) == [1, 1, 0.8, 0.6, 0.4]
    assert rates(4, lr_scheduler_type="cosine", warmup_ratio=0, min_lr_rate=0) == [1, 0.8536, 0.5, 0.1464]
    assert rates(2, lr_scheduler_type="cosine", warmup_ratio=1) == [0.5, 1]


def test_decay_is_on_matrices_only(student):
    model = AutoModelForCausalLM.from_pretrained(student)
    decayed, rest = adamw(model, Train(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0 and all(p.ndim == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_training_learns_and_the_log_adds_up(student, run_dir, tmp_path):
    loop = make_loop(student, run_dir, tmp_path, num_train_epochs=2.5, logging_steps=4, learning_rate=1e-2)
    loop.run()
    rows, summary = logged(tmp_path), loop.summary()
    assert [row["step"] for row in rows] == [4, 8, 12, 15]  # 24 rows in batches of 4, two epochs and a half
    assert summary["steps"] == 15 and summary["epochs"] == 2.5
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert (summary["first_loss"], summary["last_loss"]) == (rows[0]["loss"], rows[-1]["loss"])
    batches = [i for k in range(15) for i in loop.order.step(k)[0]]
    data = loop.data.rows
    assert rows[-1]["tokens"] == summary["tokens"] == sum(len(data[i].ids) for i in batches)
    assert rows[-1]["supervised_tokens"] == sum(data[i].supervised for i in batches)


def test_bfloat16_keeps_float32_weights_and_comes_near_float32(student, run_dir, tmp_path):
    for dtype in ("float32", "bfloat16"):
        loop = make_loop(student, run_dir, tmp_path / dtype, dtype=dtype, max_steps=6, logging_steps=3)
        loop.run()
        assert {p.dtype for p in loop.objective.parameters()} == {torch.float32}
    plain, mixed = ([row[1] for row in losses(tmp_path / dtype)] for dtype in ("float32", "bfloat16"))
    assert mixed == pytest.approx(plain, rel=0.02) and mixed != plain


def test_gradient_checkpointing_changes_no_loss(student, run_dir, tmp_path):
    for on in (False, True):
        loop = make_loop(student, run_dir, tmp_path / str(on), gradient_checkpointing=on, max_steps=4, logging_steps=1)
        loop.run()
        assert loop.objective.model.is_activation_checkpointing is on
    plain, lean = ([row[1] for row in losses(tmp_path / str(on))] for on in (False, True))
    assert lean == pytest.approx(plain, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_rows(student, run_dir, tmp_path, monkeypatch):
    loop = make_loop(student, run_dir, tmp_path, max_steps=20, logging_steps=10, save_steps=4)
    step = loop.step

    def poisoned():
        if loop.position.step == 5:  # the sixth: a weight goes bad, as an overflow would make it
            with torch.no_grad():
                next(loop.objective.parameters()).fill_(float("nan"))
        step()

    monkeypatch.setattr(loop, "step", poisoned)
    with pytest.raises(WorkError, match=r"^step 6: loss nan, gradient norm nan, on the traces") as caught:
        loop.run()
    keys = [loop.data.rows[i].key for i in loop.order.step(5)[0]]
    assert all(f"{key[0]} sample {key[1]}" in str(caught.value) for key in keys)
    assert "nothing after step-000004 was kept" in str(caught.value)
    assert loop.checkpoints.newest().name == "step-000004"  # the one of step 8 was not written


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stopping_anywhere_and_going_on_gives_the_same_losses_and_weights(student, run_dir, tmp_path, accumulation):
    """Stopped between log lines and between checkpoints; the steps since the last checkpoint are done again."""
    settings = dict(max_steps=11, logging_steps=3, save_steps=2, gradient_accumulation_steps=accumulation)
    whole = make_loop(student, run_dir, tmp_path / "whole", **settings)
    whole.run()
    done = 0
    for killed_after in (0, 2, 3, 6, 7, 10):
        loop = make_loop(student, run_dir, tmp_path / "cut", **settings)
        assert loop.position.step == done // 2 * 2
        kill_after(loop, killed_after)
        with pytest.raises(Killed):
            loop.run()
        done = killed_after
    loop = make_loop(student, run_dir, tmp_path / "cut", **settings)
    assert loop.position.step == 10
    loop.run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for a, b in zip(loop.objective.parameters(), whole.objective.parameters(), strict=True):
        assert torch.equal(a, b)


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test catches it or cleans up after it."""


def kill_after(loop, steps):
    step = loop.step

    def until():
        if loop.position.step == steps:
            raise Killed
        step()

    loop.step = until


def test_an_interrupt_saves_first(student, run_dir, tmp_path):
    loop = make_loop(student, run_dir, tmp_path, max_steps=10, save_steps=100)
    step = loop.step

    def interrupted():
        if loop.position.step == 3:
            signal.raise_signal(signal.SIGINT)
        step()

    loop.step = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.checkpoints.newest().name == "step-000004"  # the step that ran was finished and saved
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_is_not_waited_with():
    with pytest.raises(KeyboardInterrupt), loop_module.interrupts() as came:
        signal.raise_signal(signal.SIGINT)
        assert came()
        signal.raise_signal(signal.SIGINT)


def test_a_tied_head_is_stored_once_and_comes_back_tied(student, run_dir, tmp_path):
    make_loop(student, run_dir, tmp_path, max_steps=2).run()
    stored = load_file(tmp_path / "step-000002" / "model.safetensors")
    assert "model.model.embed_tokens.weight" in stored and "model.lm_head.weight" not in stored
    model = make_loop(student, run_dir, tmp_path, max_steps=2).objective.model
    assert torch.equal(model.lm_head.weight, stored["model.model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
