"""The plan's memory against what a process really takes at its peak, on four configurations of a CPU."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import train_support as support

from distill.errors import UserError
from distill.train.ranks import memory

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """
    import json, re, sys
    from pathlib import Path
    import numpy as np, torch
    sys.path.insert(0, "{tests}")
    import train_support as support
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from distill.train.ranks import memory
    from distill.train.student import methods
    from distill.train.ranks.checkpoint import Checkpoints
    from distill.train.rows.stored import Counts, TrainingSet
    from distill.train.learn.fit import Task, build
    from distill.train.learn.loop import Loop
    from distill.artefacts import RunPaths
    from distill.models import Models
    from distill.train.ranks.world import World
    from distill.train.rows.feed import StoredFeed

    place = Path("{place}")
    shape, settings, length, rows = json.loads('{arguments}')
    support.write_card(place, length)
    Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=length)).save_pretrained(place)
    recipe = support.make_recipe(place, settings | {{"max_length": length, "max_steps": 2, "logging_steps": 1}})
    lengths = np.full(rows, length, dtype=np.int32)
    supervised = int(0.8 * length)
    data = TrainingSet(
        ids=np.random.default_rng(0).integers(0, shape["vocab_size"], rows * length).astype(np.int32),
        keys=[("p", i) for i in range(rows)],
        starts=np.arange(rows, dtype=np.int64) * length,
        lengths=lengths,
        prompt_tokens=lengths - supervised,
        sources=np.zeros(rows, dtype=np.int16),
        held_out=np.zeros(rows, dtype=bool),
        truncated=np.zeros(rows, dtype=bool),
        counts=Counts(rows=rows, tokens=rows * length, supervised=rows * supervised),
    )
    world = World()
    built = build(Task(recipe, Models(recipe, place), RunPaths(place)), world)
    feed = StoredFeed(data, recipe.train)
    loop = Loop(built.learner, feed, recipe.train, Checkpoints(place / "c", 1), world, laid_out=built.wrapped)
    loop.step()
    loop.step()
    measured = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    dtypes = methods.dtypes(recipe.train, torch.device("cpu"))
    planned = memory.estimate(built.base.config, recipe.train, dtypes, *memory.largest_batch(data, recipe.train))
    print(json.dumps({{"measured": measured, "planned": planned.total, "parts": dict(planned.parts())}}))
"""

WIDE = dict(vocab_size=120_000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=True)
DEEP = dict(vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, tie_word_embeddings=False)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
CASES = {
    "a wide head": (WIDE, {}, 1024, 2),
    "many activations": (DEEP, {"per_device_train_batch_size": 2}, 768, 4),
    "FP8 products": (DEEP, {"per_device_train_batch_size": 2, "dtype": "float8"}, 768, 4),
    "LoRA with checkpointing": (DEEP, {"adapter": {"kind": "lora"}, "gradient_checkpointing": True}, 1024, 2),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_within_a_fifth_of_the_measured_one(case, tmp_path):
    shape, settings, length, rows = CASES[case]
    arguments = json.dumps([shape | HEADS, {"per_device_train_batch_size": 1} | settings, length, rows])
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(SCRIPT.format(tests=REPO / "tests", place=tmp_path / "student", arguments=arguments))
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=REPO, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ratio = found["planned"] / found["measured"]
    print(case, f"{ratio:.2f}", found)
    assert 0.8 <= ratio <= 1.2, found


def test_too_little_memory_is_said_before_the_start(tmp_path, monkeypatch):
    student = support.make_student(tmp_path / "student")
    run = support.prepare(tmp_path / "run", support.sums(24))
    monkeypatch.setattr(memory, "memory", lambda: (10**8, 10**8))
    with pytest.raises(
        UserError, match=r"^training needs about 0\.\d GB of memory .* and 0\.1 GB are available: `distill plan`"
    ):
        support.rows_of(support.make_recipe(student), run)
    assert not (run / "tokens").exists() and not list(run.glob(".tokens*"))
