"""Checkpoints: whole or not there, whatever is cut off and wherever the process dies."""

import errno
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from distill.errors import WorkError
from distill.train import checkpoint as module
from distill.train.checkpoint import Checkpoints, Position, Step
from distill.train.state import State


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
    checkpoints.log(position, {"step": step})
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
    assert position == Position(step=1000000, window=[Step((0.5,), 1.0, 1000000)], log_bytes=position.log_bytes)
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
    stored = FileSystemReader(tmp_path / "step-000001").read_metadata().state_dict_metadata
    assert {name for name in stored if not name.startswith("random")} == {"1.weight", "1.bias"}
    kept = learner[0].weight.clone()
    Checkpoints(tmp_path, 2).restore(state)
    assert torch.equal(learner[0].weight, kept)


def test_a_directory_whose_old_version_was_left_half_deleted_is_written_again(tmp_path):
    path, scratch = tmp_path / "student", tmp_path / "tmp-student"
    for version in ("one", "two", "three"):
        module.doomed(path).mkdir(exist_ok=True)
        (module.doomed(path) / "half").touch()
        with module.writing(scratch, path):
            scratch.mkdir()
            (scratch / "weights").write_text(version)
        assert [p.name for p in tmp_path.iterdir()] == ["student"] and (path / "weights").read_text() == version


def test_without_a_checkpoint_it_starts_at_nothing_and_an_empty_log(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.log(Position(), {"step": 10})
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
    checkpoints.log(Position(), {"step": 2})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    Checkpoints(tmp_path, 2).restore(state)
    assert logged(tmp_path) == [1]


@pytest.mark.parametrize("damage", ["missing file", "short file", "no state"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, state, damage):
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        save(checkpoints, state, step)
    weights = tmp_path / "step-000002" / "__0_0.distcp"
    match damage:
        case "missing file":
            weights.unlink()
        case "short file":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no state":
            (tmp_path / "step-000002" / "state.json").unlink()
    assert restored(tmp_path, state) == (1, 1.0)


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
        patch.setattr(module, "sync", deadly(module.sync))
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
        patch.setattr(module, "discard", lambda path: None)  # keep both for the moment
        save(checkpoints, state, 2)
    monkeypatch.setattr(module.shutil, "rmtree", half)
    with pytest.raises(Killed):
        module.discard(tmp_path / "step-000001")
    assert not (tmp_path / "step-000001").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file\nmore")],
)
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, state, monkeypatch, error):
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, state, 1)

    def full(directory):
        Path(directory).mkdir()
        (Path(directory) / "__0_0.distcp").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(state, "save", full)
        with pytest.raises(
            WorkError, match=r"step-000002 could not be written \(.*\): see that there is room"
        ) as caught:
            save(checkpoints, state, 2)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "step-000001"]
    assert restored(tmp_path, state) == (1, 1.0)
