"""An objective is one file and one line; and what a teacher's probabilities depend on."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest
import train_support as support

from distill.config import parse
from distill.errors import UserError
from distill.objectives import Objective
from distill.recipe import Recipe, Train
from distill.run import Run
from distill.train import stage
from distill.train.learn.fit import scalars

ROOT = Path(__file__).resolve().parents[2]

OBJECTIVES = get_args(get_args(Objective)[0])

# Cross-entropy with smoothed labels (Szegedy et al. 2016, arXiv 1512.00567, section 7).
OBJECTIVE = '''
    from typing import ClassVar, Literal

    from pydantic import Field

    from distill.objectives.base import BaseObjective


    class Smoothed(BaseObjective):
        """Learn the tokens of the traces, and a little of every other."""

        kind: Literal["smoothed"]
        share: float = Field(0.1, ge=0, lt=1, description="share of the other tokens")

        tag: ClassVar[str] = "label-smoothing"
        parts: ClassVar[dict[str, str]] = {"loss": "loss", "chosen": "cross-entropy"}

        def criterion(self, targets_s, teacher, sampled=None):
            import torch
            from torch.nn import functional as F

            def smoothed(logits_rv, start, stop, learning):
                leaf_rv = logits_rv.detach().clone().requires_grad_()
                targets_r = targets_s[start:stop]
                with torch.enable_grad():
                    loss = F.cross_entropy(leaf_rv, targets_r, label_smoothing=self.share, reduction="sum")
                    loss.backward()
                if learning:
                    logits_rv.copy_(leaf_rv.grad)
                return torch.stack((loss, F.cross_entropy(leaf_rv, targets_r, reduction="sum"))).detach()

            return smoothed
'''
LINE = ("    | Grpo,\n", "    | Grpo\n    | Smoothed,\n")
TRAINING = """
    import json, sys
    from pathlib import Path
    sys.path.insert(0, "{tests}")
    import train_support as support
    import distill.objectives
    assert distill.objectives.__file__.startswith("{package}")
    student, directory = Path("{student}"), Path("{run}")
    support.begin(directory, support.sums(12), student)
    support.train_here(
        directory, student, {{"objective": {{"kind": "smoothed", "share": 0.2}}, "max_steps": 6, "logging_steps": 1}}
    )
    rows = [json.loads(line) for line in (directory / "checkpoints" / "log.jsonl").read_text().splitlines()]
    assert all(row["loss"] > row["chosen"] for row in rows) and rows[-1]["loss"] < rows[0]["loss"]
    assert "label-smoothing" in (directory / "student" / "README.md").read_text()
"""


def test_an_objective_is_one_file_and_one_line_and_is_trained(tmp_path):
    student = support.make_student(tmp_path / "student")
    package = tmp_path / "copy" / "distill"
    shutil.copytree(ROOT / "distill", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (package / "objectives" / "smoothed.py").write_text(textwrap.dedent(OBJECTIVE))
    table = package / "objectives" / "__init__.py"
    text = table.read_text()
    assert LINE[0] in text
    table.write_text(
        text.replace(*LINE).replace("\n__all__", "\nfrom distill.objectives.smoothed import Smoothed\n\n__all__")
    )
    places = {"tests": ROOT / "tests", "package": package, "student": student, "run": tmp_path / "run"}
    script = textwrap.dedent(TRAINING.format(**places))
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def problem(train):
    fields = support.make_recipe(Path("/nowhere")).model_dump(mode="json")
    with pytest.raises(UserError) as caught:
        parse(Recipe, fields | {"train": train}, "my.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "train, message",
    [
        ({"objective": {"kind": "sft", "divergence": "jsd"}}, "train.objective.divergence: unknown key"),
        ({"objective": {"kind": "logits", "temperature": 0}}, "train.objective.temperature: should be greater than 0"),
        ({"objective": {"kind": "rl"}}, "'kind' should be one of 'sft', 'logits'"),
        ({"objective": {}}, "the key 'kind' is missing"),
        ({"adapter": {"kind": "lora", "rank": 4}}, "train.adapter.rank: unknown key"),
        ({"adapter": {"kind": "lora", "dropout": 1}}, "train.adapter.dropout: should be less than 1"),
    ],
)
def test_a_variant_owns_its_fields(train, message):
    assert message in problem(train)


# ---- what the rows and the teacher's numbers depend on


@pytest.fixture
def run(tmp_path):
    """Settings of the stage for a recipe, without its teacher's weights."""
    student = support.make_student(tmp_path / "student")
    directory = support.begin(tmp_path / "run", support.sums(4), student)

    def settings(train, **recipe):
        made = support.make_recipe(student, train)
        with Run(directory, made.model_copy(update=recipe)) as opened:
            return stage.row_settings(opened), stage.teacher_settings(opened)

    return settings


def test_every_field_of_train_that_decides_rows_is_in_their_fingerprint(run):
    before, _ = run({})
    changes = {
        "max_length": 100,
        "overlong": "truncate",
        "max_position_embeddings": 4096,
        "data": [{"kind": "kept", "plain": True}],
        "content": "answer",
        "val_size": 0.5,
        "seed": 9,
        "chat_template": "llama3",
        "objective": {"kind": "logits"},
    }
    for key, value in changes.items():
        assert run({key: value})[0] != before, key
    for key, value in {"learning_rate": 1.0, "save_steps": 7, "packing": True, "dtype": "bfloat16"}.items():
        assert run({key: value})[0] == before, key


def test_the_teachers_numbers_depend_on_all_of_its_identity_and_on_how_the_engine_computes(run):
    logits = {"objective": {"kind": "logits", "top_k": 4}}
    engine = support.make_recipe(Path("/nowhere")).engine
    rows, before = run(logits)
    assert rows["teacher.top_k"] == 4
    assert {
        "teacher.weights",
        "teacher.chat_template",
        "engine.dtype",
        "engine.kv_cache_dtype",
        "engine.device",
    } <= set(before)
    for change in ({"dtype": "float32"}, {"kv_cache_dtype": "fp8"}):
        assert run(logits, engine=engine.model_copy(update=change))[1] != before
    assert run({})[1] == {}, "without a teacher nothing of it matters"


def test_another_thinking_mode_is_another_teacher(run, monkeypatch):
    from distill.models import Model

    logits = {"objective": {"kind": "logits"}}
    _, before = run(logits)
    identity = Model.identity.func
    monkeypatch.setattr(Model, "identity", property(lambda model: identity(model) | {"thinking": True}))
    _, after = run(logits)
    assert after == before | {"teacher.thinking": True}


GIVEN: dict[str, dict[str, object]] = {"on_policy": {"teachers": {"code": "tiny-r1"}}, "grpo": {"clip": [0.2, 0.3]}}


@pytest.mark.parametrize("kind", [get_args(each.model_fields["kind"].annotation)[0] for each in OBJECTIVES])
def test_trackers_are_given_scalars(kind):
    settings = Train.model_validate({"objective": {"kind": kind} | GIVEN.get(kind, {}), "adapter": {"kind": "lora"}})
    given = scalars(settings)
    assert given.keys() == settings.settings().keys()
    assert all(value is None or isinstance(value, bool | int | float | str) for value in given.values())


def test_defaults_are_sft_on_all_weights():
    settings = Train()
    assert settings.objective.kind == "sft" and settings.adapter is None
    assert settings.objective.teacher_top_k is None
