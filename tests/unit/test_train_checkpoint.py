"""Checkpoints: whole or not there, whatever is cut off and wherever the process dies."""

import errno
import itertools
import json
import re
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from distill import durable
from distill.errors import UserError, WorkError
from distill.train.ranks import checkpoint as module
from distill.train.ranks import tensors
from distill.train.ranks.checkpoint import Checkpoints, Position, Step
from distill.train.ranks.tensors import State

FILE = "rank-00000-000.safetensors"


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test catches it or cleans up after it."""


@pytest.fixture
def state():
    """The state of one weight, 0, and its optimiser."""
    learner = torch.nn.Linear(1, 1, bias=False)
    learner.requires_grad_()
    torch.nn.init.zeros_(learner.weight)
    return State(learner, torch.optim.AdamW(learner.parameters(), fused=True))


def fill(state, value):
    with torch.no_grad():
        state.learner.weight.fill_(value)


def save(checkpoints, state, step):
    """A checkpoint whose weight is its step, and a log line for each step."""
    fill(state, step)
    position = Position(step=step, window=[Step((0.5,), 1.0, step)])
    checkpoints.log({"step": step})
    checkpoints.save(state, position)


def restored(directory, state):
    fill(state, -1)
    position = Checkpoints(directory, 2).restore(state)
    return position.step, state.learner.weight.item()


def logged(directory):
    return [json.loads(line)["step"] for line in (directory / "log.jsonl").read_text().splitlines()]


def test_the_newest_comes_back_with_its_position(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, state, 9)
    save(checkpoints, state, 1000000)  # seven digits sort after six
    position = Checkpoints(tmp_path, 2).restore(state)
    assert position == Position(step=1000000, window=[Step((0.5,), 1.0, 1000000)])
    assert state.learner.weight.item() == 1000000


def test_random_numbers_go_on_where_they_were(tmp_path, state):
    """Dropout draws them."""
    save(Checkpoints(tmp_path, 2), state, 1)
    drawn = torch.rand(3)
    Checkpoints(tmp_path, 2).restore(state)
    assert torch.equal(torch.rand(3), drawn)


def test_the_optimiser_goes_on_where_it_was(tmp_path, state):
    def descend():
        state.learner.weight.grad = torch.ones(1, 1)
        state.optimizer.step()

    descend()
    save(Checkpoints(tmp_path, 2), state, 1)
    descend()
    after = state.learner.weight.item(), state.optimizer.state[state.learner.weight]["exp_avg"].item()
    again = State(torch.nn.Linear(1, 1, bias=False), None)
    again.optimizer = torch.optim.AdamW(again.learner.parameters(), fused=True)
    Checkpoints(tmp_path, 2).restore(again)
    state = again
    descend()
    assert (state.learner.weight.item(), state.optimizer.state[state.learner.weight]["exp_avg"].item()) == after
    assert state.optimizer.state[state.learner.weight]["step"] == 2


def test_what_is_frozen_is_not_stored_and_stays(tmp_path):
    learner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    learner[0].requires_grad_(False)
    state = State(learner, torch.optim.AdamW(learner[1].parameters()))
    Checkpoints(tmp_path, 2).save(state, Position(step=1))
    with safe_open(tmp_path / "step-000001" / FILE, framework="pt") as file:
        assert {name for name in file.keys() if not name.startswith("random")} == {"1.weight", "1.bias"}  # noqa: SIM118
    kept = learner[0].weight.clone()
    Checkpoints(tmp_path, 2).restore(state)
    assert torch.equal(learner[0].weight, kept)


def test_parameters_that_the_optimiser_does_not_hold_are_not_saved(tmp_path, state):
    """Such as those that a forward pass has gathered: they have no state, and the dtype of that pass."""
    held, state.learner.weight = state.learner.weight, torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="^weight is not what the optimiser updates"):
        Checkpoints(tmp_path, 2).save(state, Position(step=1))
    state.learner.weight = held
    Checkpoints(tmp_path, 2).save(state, Position(step=1))


class Counting(torch.optim.Optimizer):
    """Counts its steps in a plain number and makes its state where there is none, as bitsandbytes' optimisers do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p] = {"step": 0, "scale": 0.5, "mean": torch.zeros_like(p)}
            self.state[p]["step"] += 1
            self.state[p]["scale"] /= 2
            self.state[p]["mean"] += 1


def test_plain_numbers_of_an_optimisers_state_are_restored(tmp_path):
    first, again = (State(linear, Counting(linear.parameters())) for linear in (torch.nn.Linear(2, 1) for _ in "ab"))
    for _ in range(3):
        first.optimizer.step()
    Checkpoints(tmp_path, 2).save(first, Position(step=3))
    Checkpoints(tmp_path, 2).restore(again)
    for _ in range(2):
        again.optimizer.step()
    state = again.optimizer.state[again.learner.weight]
    assert (type(state["step"]), state["step"], state["scale"]) == (int, 5, 0.5**6)
    assert state["mean"].tolist() == [[5.0, 5.0]]


def test_a_directory_whose_old_version_was_left_half_deleted_is_written_again(tmp_path):
    path = tmp_path / "student"
    for version in ("one", "two", "three"):
        durable.old_name(path).mkdir(exist_ok=True)
        (durable.old_name(path) / "half").touch()
        with module.writing(path) as scratch:
            (scratch / "weights").write_text(version)
        assert [p.name for p in tmp_path.iterdir()] == ["student"] and (path / "weights").read_text() == version


def test_without_a_checkpoint_it_starts_at_nothing_and_an_empty_log(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.log({"step": 10})
    assert checkpoints.restore(state) == Position()
    assert logged(tmp_path) == []


def test_at_most_the_limit_is_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3, 4):
        save(checkpoints, state, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "step-000003", "step-000004"]


def test_the_log_is_cut_back_to_the_checkpoint_half_a_line_included(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, state, 1)
    checkpoints.log({"step": 2})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    Checkpoints(tmp_path, 2).restore(state)
    assert logged(tmp_path) == [1]


def flip(path, byte=-1, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


DAMAGE = {
    "no tensors": lambda path: (path / FILE).unlink(),
    "short tensors": lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-1]),
    "a bit of the tensors": lambda path: flip(path / FILE),
    "a bit of the header": lambda path: flip(path / FILE, 20),
    "a bit of the log": lambda path: flip(path / "log.jsonl"),
    "no state": lambda path: (path / "state.json").unlink(),
    "another step": lambda path: edit(path / "state.json", '"step": 2', '"step": 3'),
    "a state that is a list": lambda path: (path / "state.json").write_text("[]"),
    "an empty state": lambda path: (path / "state.json").write_text("{}"),
    "an empty file": lambda path: (path / "state.json").write_bytes(b""),
}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_loaded(tmp_path, state, damage, capsys):
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        save(checkpoints, state, step)
    DAMAGE[damage](tmp_path / "step-000002")
    assert restored(tmp_path, state) == (1, 1.0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'step-000002'}/")
    assert line.endswith("the checkpoint is deleted, training resumes from step-000001")
    assert not (tmp_path / "step-000002").exists() and logged(tmp_path) == [1]
    DAMAGE["a bit of the tensors"](tmp_path / "step-000001")
    assert restored(tmp_path, state) == (0, -1.0)
    assert "training starts over" in capsys.readouterr().out and logged(tmp_path) == []


def test_other_directories_and_files_are_no_checkpoints(tmp_path, state):
    save(Checkpoints(tmp_path, 2), state, 1)
    for name in ("step-xyz", "step-", "step-000002.old", "step-7"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000003").write_text("a file")
    assert restored(tmp_path, state) == (1, 1.0)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, state):
    save(Checkpoints(tmp_path, 2, fingerprint="a"), state, 1)
    with pytest.raises(UserError, match=r"step-000001 belongs to a training with other settings; --fresh train"):
        Checkpoints(tmp_path, 2, fingerprint="b").restore(state)


def test_a_log_that_was_lost_comes_back(tmp_path, state):
    save(Checkpoints(tmp_path, 2), state, 1)
    for text in (None, "", '{"step": 9}\n' * 5):
        (tmp_path / "log.jsonl").unlink()
        if text is not None:
            (tmp_path / "log.jsonl").write_text(text)
        Checkpoints(tmp_path, 2).restore(state)
        assert logged(tmp_path) == [1]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path, state):
    save(Checkpoints(tmp_path, 2), state, 1)
    assert sorted(p.name for p in (tmp_path / "step-000001").iterdir()) == ["log.jsonl", FILE, "state.json"]
    source = "".join(path.read_text() for path in Path(module.__file__).parents[2].rglob("*.py"))
    assert not re.findall(r"torch\.load\(|import pickle\b|allow_pickle=True|FileSystemReader\(", source)


@given(rows=st.integers(1, 40), old=st.integers(1, 7), new=st.integers(1, 7), limit=st.sampled_from([40, 1 << 30]))
def test_shards_of_any_number_of_ranks_are_read_by_any_other(rows, old, new, limit):
    """Rows of a whole tensor, split as torch.chunk does, saved by some ranks and read by others."""
    whole = torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3)

    def pieces(ranks):
        size = -(-rows // ranks)
        return [tensors.Piece(whole[i * size : (i + 1) * size], (rows, 3), min(rows, i * size)) for i in range(ranks)]

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "FILE_BYTES", limit)
        for rank, piece in enumerate(pieces(old)):
            patch.setattr(tensors, "piece_of", lambda tensor, piece=piece: piece._replace(local=tensor))
            patch.setattr(tensors, "DTensor", torch.Tensor)
            Pieces(rank, {"a": piece.local + 1, "b": piece.local}).save(Path(place))
        with ExitStack() as stack:
            stored = tensors.Stored(Path(place), stack)
            for piece in pieces(new):
                into = piece._replace(local=torch.full_like(piece.local, -1))
                stored.read("b", into)
                assert torch.equal(into.local, piece.local)


class Pieces(State):
    """The state of a rank that holds given tensors."""

    def __init__(self, rank, held):
        self.rank, self.held = rank, held

    def _tensors(self):
        return iter(self.held.items())


def test_killed_at_any_call_to_the_file_system(tmp_path, state):
    """Die at the n-th fsync, rename or deletion of a save that also deletes: 2 or 3 is there, never a half."""
    survived = [(2, 2.0)]
    for calls in itertools.count():
        directory = tmp_path / str(calls)
        checkpoints = Checkpoints(directory, 1)
        save(checkpoints, state, 2)
        died = save_dying_after(calls, checkpoints, state)
        survived.append(restored(directory, state))
        assert survived[-1] in {survived[-2], (3, 3.0)}  # and once 3 is there, no later death takes it back
        assert logged(directory) == [2, 3][: survived[-1][0] - 1]
        save(Checkpoints(directory, 1), state, 4)
        assert sorted(p.name for p in directory.iterdir()) == ["log.jsonl", "step-000004"]
        if not died:
            break
    assert survived.count((2, 2.0)) > 5 and survived.count((3, 3.0)) > 3


def save_dying_after(calls, checkpoints, state):
    """Save step 3 and die at the file-system call after so many. False when there were not so many."""
    left = calls

    def deadly(real):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner in (module, durable):
            patch.setattr(owner, "sync", deadly(durable.sync))
        patch.setattr(Path, "rename", deadly(Path.rename))
        patch.setattr(module.shutil, "rmtree", deadly(shutil.rmtree))
        try:
            save(checkpoints, state, 3)
        except Killed:
            return True
    return False


def test_deleting_a_checkpoint_never_leaves_half_of_it_under_its_name(tmp_path, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 1)
    save(checkpoints, state, 1)

    def half(path, **_):
        next(iter(sorted(Path(path).glob("*")))).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_directory", lambda path: None)  # keep both for the moment
        save(checkpoints, state, 2)
    monkeypatch.setattr(durable.shutil, "rmtree", half)
    with pytest.raises(Killed):
        durable.remove_directory(tmp_path / "step-000001")
    assert not (tmp_path / "step-000001").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file\nmore")],
)
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, state, monkeypatch, error):
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, state, 1)

    def full(directory):
        (Path(directory) / FILE).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(state, "save", full)
        with pytest.raises(
            WorkError, match=r"step-000002 could not be written \(.*\): make sure that there is free"
        ) as caught:
            save(checkpoints, state, 2)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "step-000001"]
    assert restored(tmp_path, state) == (1, 1.0)
