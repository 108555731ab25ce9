"""The store of rollouts: their likeliest tokens, and what is appended beside other work."""

import numpy as np
import pytest

from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace
from distill.train.rollouts.store import RolloutStore
from distill.train.rollouts.student import Rollout


def two_rollouts():
    """Samples 0 and 1 of a prompt, of three and of four tokens, with three likeliest tokens at each."""
    prompt = Prompt.from_question("What is 1 + 1?", "2")
    return [
        Rollout(
            Trace(prompt, sample, 0, "2", None, "2", "stop", "student", completion_token_ids=tuple(range(3 + sample))),
            (np.arange(3 + sample)[:, None] + np.arange(3) + sample).astype(np.int32),
        )
        for sample in (0, 1)
    ]


def test_a_damaged_file_of_likeliest_tokens_is_refused(tmp_path):
    store = RolloutStore(tmp_path / "rollouts", 4)
    rollouts = two_rollouts()
    store.append(0, rollouts)
    store.close()
    traces = [each.trace for each in rollouts]
    read = store.likeliest(0, traces)
    assert all((ours == each.likeliest).all() for ours, each in zip(read, rollouts, strict=True))
    assert store.likeliest(1, traces) is None and store.likeliest(0, traces[:1]) is None
    path = tmp_path / "rollouts" / "likeliest-000000.npy"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"likeliest-000000\.npy: damaged .*; delete it, and training recomputes it"):
        store.likeliest(0, traces)


def test_a_set_is_stored_at_the_end_of_the_block_that_it_is_stored_beside(tmp_path, monkeypatch):
    store = RolloutStore(tmp_path / "rollouts", 4)
    rollouts = two_rollouts()
    with store.appending(0, rollouts, {rollouts[0].trace.key}):
        pass
    assert [trace.key for trace in store.from_set(0)[0]] == [rollouts[1].trace.key]
    with pytest.raises(ZeroDivisionError), store.appending(1, rollouts, ()):
        raise ZeroDivisionError
    assert len(store.likeliest(1, [each.trace for each in rollouts])) == 2, "the block's error does not cut it short"
    monkeypatch.setattr(store, "append", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"), store.appending(2, rollouts, ()):
        pass
    store.close()
