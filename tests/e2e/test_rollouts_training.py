"""Trainings on rollouts from end to end, in one process: a copy as the teacher, traces beside rollouts, what is refused
and read before the first step."""

import json
import shutil

import pytest
import rollout_support as support

from distill import pipeline
from distill.catalog import resolve_weights
from distill.chat import Chat
from distill.errors import UserError
from distill.recipe import Recipe
from distill.run import Run
from distill.train import STAGE
from distill.train.rows import stored

STUDENT = resolve_weights("student", "tiny-qwen")


def changed(recipe, **values):
    return Recipe.model_validate(recipe.model_dump() | values)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_copy_of_the_student_teaches_nothing(tmp_path, divergence):
    """Engine, alignment and objective together: divergence and gradient are zero, and not so for another teacher."""
    recipe = support.make_recipe(support.ON_POLICY | {"divergence": divergence}, max_steps=1)
    support.train(tmp_path / "copy", changed(recipe, teacher=str(STUDENT)))
    (row,) = support.log(tmp_path / "copy")
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["loss"] == pytest.approx(0, abs=1e-6)
    assert row["grad_norm"] < 1e-4 and row["unscored"] == 0 and row["mismatch"] < 1e-5
    support.train(tmp_path / "other", recipe)
    (other,) = support.log(tmp_path / "other")
    assert other["kl"] > 0.01 and other["grad_norm"] > 0.01


def test_a_student_with_an_extended_context_samples_in_it(tmp_path):
    """Prompts and answers are longer than the base's context. Trainer, engine and the reference compute the same."""
    base = shutil.copytree(STUDENT, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    objective = support.GRPO | {"kl_weight": 0.1}
    longer = {"max_position_embeddings": 128, "rope_theta": 2e4}
    sampling = {"temperature": 3.0, "max_new_tokens": 12}  # of many lengths, so that groups have variance
    recipe = support.make_recipe(objective, {"sampling": sampling}, str(base), max_steps=2, **longer)
    support.train(tmp_path / "run", recipe)
    first, second = support.log(tmp_path / "run")
    assert first["kl"] == pytest.approx(0, abs=1e-6) and max(first["mismatch"], second["mismatch"]) < 1e-5
    assert all(len(trace.prompt_token_ids) > 8 for trace in support.rollouts(tmp_path / "run"))
    trained = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert (trained["max_position_embeddings"], trained["rope_theta"]) == (128, 2e4)


@pytest.mark.slow
def test_a_4_bit_student_samples_from_what_is_trained(tmp_path):
    """Its dequantised base with its adapters: the engine's log-probabilities are the trainer's, also after a step."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'distill[qlora]'")
    recipe = support.make_recipe(support.GRPO, max_steps=2, learning_rate=1e-2, adapter={"kind": "qlora"})
    support.train(tmp_path / "run", recipe)
    first, second = support.log(tmp_path / "run")
    assert first["grad_norm"] > 0 and max(first["mismatch"], second["mismatch"]) < 1e-5


def test_traces_are_learnt_beside_rollouts(tmp_path):
    """GKD with λ = 0.64 on real traces: 16 rollouts and 9 traces a step, so that two steps see each of 18 traces."""
    recipe = support.make_recipe(
        support.ON_POLICY | {"student_share": 0.64}, per_device_train_batch_size=8, max_length=256
    )
    recipe = changed(recipe, generate={"sampling": {"max_new_tokens": 128}}, filter={})
    pipeline.run_recipe(recipe, tmp_path / "run", ["generate", "filter", "train"])
    with Run(tmp_path / "run", recipe) as run:
        summary = run.stored_summary("train", STAGE.summary)
    rows = stored.load(run.paths.tokens)
    assert rows is not None and len(rows) == 18 == summary.rows
    log = support.log(tmp_path / "run")
    traced = summary.supervised_tokens - summary.rollout_tokens
    assert (summary.steps, summary.rollouts, traced) == (4, 64, 2 * rows.counts.supervised)
    assert all(row["kl"] > 0 and row["unscored"] < 1 for row in log)
    assert len(support.rollouts(tmp_path / "run")) == 64, "traces are no rollouts"


def test_prompts_are_read_and_tokenized_once(tmp_path, monkeypatch):
    from distill import run
    from distill.train.rollouts import questions

    reads, tokenized = [], []
    load, prompts_ids = run.load_prompts, Chat.prompts_ids

    def counted(chat, conversations):
        tokenized.append(known := list(conversations))
        return prompts_ids(chat, known)

    for module in (run, questions):
        monkeypatch.setattr(module, "load_prompts", lambda *args, **more: reads.append(1) or load(*args, **more))
    monkeypatch.setattr(Chat, "prompts_ids", counted)
    support.train(tmp_path / "run", support.make_recipe(support.GRPO, max_steps=1))
    assert len(reads) == 1 and [len(known) for known in tokenized] == [18, 4], "all of them, and those of the one set"


def test_too_little_memory_is_said_before_the_stage_begins(tmp_path, monkeypatch):
    from distill.train.ranks import memory

    monkeypatch.setattr(memory, "memory", lambda: (10**8, 10**8))
    begun = []
    monkeypatch.setattr(Run, "begin", lambda *args: begun.append(args))
    with pytest.raises(UserError, match=r"^training needs about 0\.\d GB of memory .* and 0\.1 GB are available"):
        support.train(tmp_path / "run", support.make_recipe(support.GRPO))
    assert begun == [] and not (tmp_path / "run").exists()
