"""The training loop: any split of a step, the schedule by hand, held-out rows, NaN, jumps, exact resuming."""

import json
import signal

import pytest
import torch
import torch.distributed as dist
import train_support as support
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from distill import console
from distill.errors import WorkError
from distill.recipe import Train
from distill.train.learn import loop as loop_module
from distill.train.learn.loop import schedule
from distill.train.ranks.world import World
from distill.train.rows import gate
from distill.train.student import methods
from distill.train.student.methods import optimizer


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return support.prepare(tmp_path_factory.mktemp("run"), support.sums(24))


def make_loop(student, run_dir, directory, **settings):
    return support.make_loop(student, run_dir, directory / "checkpoints", settings)


def logged(directory):
    return [json.loads(line) for line in (directory / "checkpoints" / "log.jsonl").read_text().splitlines()]


def losses(directory):
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in logged(directory)]


def test_any_split_of_a_step_into_batches_gives_the_same_training(student, tmp_path):
    run_dir = support.prepare(tmp_path / "run", support.sums(8))  # one step an epoch: the same rows whatever the split
    weights = []
    for batch_size, accumulation, packing in ((8, 1, False), (2, 4, False), (3, 3, False), (1, 8, True)):
        loop = make_loop(
            student,
            run_dir,
            tmp_path / f"{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            packing=packing,
            learning_rate=1e-4,
            max_steps=3,
            logging_steps=1,
        )
        loop.run()
        weights.append(torch.cat([p.detach().flatten() for p in loop.learner.parameters()]))
    reference, *others = (losses(tmp_path / name) for name in ("8", "2", "3", "1"))
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
    decayed, rest = optimizer(model, Train(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0 and all(p.ndim == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_training_learns_and_the_log_adds_up(student, run_dir, tmp_path):
    loop = make_loop(student, run_dir, tmp_path, num_train_epochs=2.5, logging_steps=4, learning_rate=1e-2)
    loop.run()
    rows, summary = logged(tmp_path), loop.summary()
    assert [row["step"] for row in rows] == [4, 8, 12, 15]  # 24 rows in batches of 4, two epochs and a half
    assert summary.steps == 15 and summary.epochs == 2.5
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert (summary.first_loss, summary.last_loss) == (rows[0]["loss"], rows[-1]["loss"])
    batches = [i for k in range(15) for i in loop.feed.indices(k)[0]]
    assert rows[-1]["tokens"] == summary.tokens == sum(len(loop.feed.rows[i].ids) for i in batches)
    assert rows[-1]["supervised_tokens"] == sum(loop.feed.rows[i].supervised for i in batches)


def test_bfloat16_keeps_float32_weights_and_comes_near_float32(student, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "multiplies_bfloat16", lambda: True)  # if need be slowly
    for dtype in ("float32", "bfloat16"):
        loop = make_loop(student, run_dir, tmp_path / dtype, dtype=dtype, max_steps=6, logging_steps=3)
        loop.run()
        assert {p.dtype for p in loop.learner.parameters()} == {torch.float32}
    plain, mixed = ([row[1] for row in losses(tmp_path / dtype)] for dtype in ("float32", "bfloat16"))
    assert mixed == pytest.approx(plain, rel=0.02) and mixed != plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16 whatever the processor does")
def test_a_processor_without_bfloat16_computes_in_float32_and_says_so(student, run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "multiplies_bfloat16", lambda: False)
    for dtype in ("float32", "bfloat16"):
        make_loop(student, run_dir, tmp_path / dtype, dtype=dtype, max_steps=3, logging_steps=1).run()
    assert losses(tmp_path / "bfloat16") == losses(tmp_path / "float32")
    assert capsys.readouterr().out.count("has no bfloat16 matrix products: the forward pass runs in float32") == 1


def test_gradient_checkpointing_changes_no_loss(student, run_dir, tmp_path):
    for on in (False, True):
        loop = make_loop(student, run_dir, tmp_path / str(on), gradient_checkpointing=on, max_steps=4, logging_steps=1)
        loop.run()
        assert loop.learner.model.is_activation_checkpointing is on
    plain, lean = ([row[1] for row in losses(tmp_path / str(on))] for on in (False, True))
    assert lean == pytest.approx(plain, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_rows(student, run_dir, tmp_path, monkeypatch):
    loop = make_loop(student, run_dir, tmp_path, max_steps=20, logging_steps=10, save_steps=4)
    step = loop.step

    def poisoned():
        if loop.position.step == 5:  # the sixth: a weight goes bad, as an overflow would make it
            with torch.no_grad():
                next(loop.learner.parameters()).fill_(float("nan"))
        step()

    monkeypatch.setattr(loop, "step", poisoned)
    with pytest.raises(WorkError, match=r"^step 6: loss nan, gradient norm nan, on the traces") as caught:
        loop.run()
    keys = [loop.feed.rows[i].key for i in loop.feed.indices(5)[0]]
    assert all(f"{key[0]} sample {key[1]}" in str(caught.value) for key in keys)
    assert "the newest checkpoint is step-000004" in str(caught.value)
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
    for a, b in zip(loop.learner.parameters(), whole.learner.parameters(), strict=True):
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


def test_an_interrupt_saves_first_and_says_what_is_saved(student, run_dir, tmp_path, capsys):
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
    path = tmp_path / "checkpoints" / "step-000004"
    assert f"training interrupted after step 4; {path} is saved" in capsys.readouterr().out


def test_slow_steps_show_their_loss_and_seconds(student, run_dir, tmp_path, monkeypatch, capsys):
    """Without waiting for a log line."""
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(loop_module, "SHOW_SECONDS", -1.0)
    loop = make_loop(student, run_dir, tmp_path, max_steps=3, logging_steps=100)
    loop.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train: ")]
    assert [line.split(", ")[0] for line in lines[:3]] == ["train: 1/3 steps", "train: 2/3 steps", "train: 3/3 steps"]
    assert all(", loss 5." in line for line in lines)


def test_a_second_interrupt_is_not_waited_with():
    with pytest.raises(KeyboardInterrupt), loop_module.interrupts() as came:
        signal.raise_signal(signal.SIGINT)
        assert came()
        signal.raise_signal(signal.SIGINT)


def test_a_tied_head_is_stored_once_and_comes_back_tied(student, run_dir, tmp_path):
    make_loop(student, run_dir, tmp_path, max_steps=2).run()
    with safe_open(tmp_path / "checkpoints" / "step-000002" / "rank-00000-000.safetensors", framework="pt") as file:
        names = {name for name in file.keys() if name.startswith("model.")}  # noqa: SIM118  not a dict
    assert "model.model.embed_tokens.weight" in names and not any("lm_head" in name for name in names)
    model = make_loop(student, run_dir, tmp_path, max_steps=2).learner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_held_out_rows_are_scored_and_not_trained(student, run_dir, tmp_path):
    loop = make_loop(student, run_dir, tmp_path, val_size=0.3, eval_steps=2, logging_steps=3, max_steps=6)
    held_out = [i for i, held in enumerate(loop.feed.rows.held_out) if held]
    assert held_out and not set(held_out) & {i for k in range(12) for batch in loop.feed.indices(k) for i in batch}
    loop.run()
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4, 6] and [("eval_loss" in row) for row in rows] == [1, 0, 1, 1]
    model, total, supervised = loop.learner.model, 0.0, 0
    for i in held_out:  # by transformers' own loss, one row after the other
        row = loop.feed.rows[i]
        ids_1t = torch.from_numpy(row.ids.astype("int64"))[None].to(model.device)
        labels = ids_1t.clone()
        labels[0, : row.prompt_tokens] = -100
        model.set_attn_implementation("eager")
        total += model(ids_1t, labels=labels).loss.item() * row.supervised
        supervised += row.supervised
    assert rows[-1]["eval_loss"] == loop.summary().eval_loss == pytest.approx(total / supervised, rel=1e-5)


def test_scoring_changes_no_training(student, run_dir, tmp_path):
    for every in (1, 100):
        make_loop(student, run_dir, tmp_path / str(every), val_size=0.3, eval_steps=every, max_steps=5).run()
    often, once = (logged(tmp_path / str(every))[-1] for every in (1, 100))
    assert often["eval_loss"] == once["eval_loss"] and often["grad_norm"] == once["grad_norm"]


@pytest.fixture
def sharded(monkeypatch):
    """FSDP in one process: every parameter is a shard, and is gathered for a forward pass."""
    monkeypatch.setattr(World, "layout", "fsdp")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_that_were_scored_are_saved_with_all_of_their_optimisers_state(
    student, run_dir, tmp_path, monkeypatch, sharded, dtype
):
    """FSDP gathers the outermost unit's parameters for an evaluation, and frees them after a backward pass only."""
    monkeypatch.setattr(methods, "multiplies_bfloat16", lambda: True)
    settings = dict(val_size=0.3, eval_steps=2, save_steps=2, logging_steps=1, max_steps=4, dtype=dtype)
    whole = make_loop(student, run_dir, tmp_path / "whole", **settings)
    whole.run()
    cut = make_loop(student, run_dir, tmp_path / "cut", **settings)
    kill_after(cut, 2)
    with pytest.raises(Killed):
        cut.run()
    names = [name for name, _ in cut.learner.named_parameters()]
    with safe_open(tmp_path / "cut/checkpoints/step-000002/rank-00000-000.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  not a dict
    for name in names:
        entries = [name, *(f"optimizer.{name}.{entry}" for entry in ("exp_avg", "exp_avg_sq", "step"))]
        assert [saved.get(entry) for entry in entries] == [torch.float32] * 4, name
    loop = make_loop(student, run_dir, tmp_path / "cut", **settings)
    loop.run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for a, b in zip(loop.learner.parameters(), whole.learner.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())


def test_a_jump_of_the_loss_is_warned_of_with_its_rows(student, run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop_module, "RECENT", 4)
    loop = make_loop(student, run_dir, tmp_path, max_steps=8, logging_steps=1, learning_rate=1e-4)
    step = loop.step

    def disturbed():
        step()
        if loop.position.step == 6:
            parts, norm, supervised = loop.pending.pop()
            loop.pending.append((parts * 3, norm, supervised))

    monkeypatch.setattr(loop, "step", disturbed)
    loop.run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 1 and said[0].startswith("warning: step 6: loss 1") and "5." in said[0]
    assert all(gate.name(loop.feed.rows.keys[i]) in said[0] for i in loop.feed.indices(5)[0])


def test_figures_go_to_a_tracker(student, run_dir, tmp_path):
    """TensorBoard's is not installed; a tracker of ours stands for any of Accelerate's."""
    from accelerate.tracking import GeneralTracker

    told = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "told", False, None

        def log(self, values, step=None, **kwargs):
            told.append((step, values))

    loop = make_loop(student, run_dir, tmp_path, max_steps=4, logging_steps=2)
    loop.world.accelerator.trackers = [Tracker()]
    loop.run()
    assert [(step, values["loss"]) for step, values in told] == [(r["step"], r["loss"]) for r in logged(tmp_path)]
