"""Students of families that the engine does not compute, from `train` to the student's directory."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout_support
import train_support as support

from distill import catalog
from distill.artefacts import TrainSummary
from distill.chat import Chat
from distill.errors import UserError
from distill.plan.training import plan_training
from distill.run import Run
from distill.train.learn.loop import Loop
from distill.train.student import model

CAPPED = "attention takes softcap, which that of concatenated rows does not compute"
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "head_dim": 8, "sliding_window": None},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
}


def trained(tmp_path, family, config=None, **settings) -> TrainSummary:
    student = support.make_other(tmp_path / "base", family, **config or {})
    support.begin(tmp_path / "run", support.sums(24), student)
    return support.train_here(tmp_path / "run", student, {"num_train_epochs": 2.0, "logging_steps": 1, **settings})


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "family, config, packing, reason",
    [
        ("gpt_neox", {}, True, None),
        ("gemma2", {"head_dim": 8}, True, CAPPED),
        ("qwen3_5_text", support.HYBRID, True, None),
        ("mixtral", EXPERTS["mixtral"], False, None),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, True, None),
    ],
)
def test_a_student_is_trained_and_loads(tmp_path, capsys, family, config, packing, reason):
    summary = trained(tmp_path, family, config, packing=packing)
    assert summary.last_loss < summary.first_loss - 0.2 and summary.padded_rows == reason
    printed = " ".join(capsys.readouterr().out.split())
    how = "train.packing chooses the rows of a batch, and they are padded" if packing else "rows are padded"
    said = f"{how}, not concatenated: in models of type {family!r} {CAPPED}"
    assert (said in printed) == (reason is not None)
    record = json.loads((tmp_path / "run/stages/train.json").read_text())
    assert record["summary"]["padded_rows"] == reason
    student, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and student.config.model_type == family
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    moved = [not torch.equal(a, b) for a, b in zip(student.parameters(), base.parameters(), strict=True)]
    assert sum(moved) > len(moved) // 2, "what was trained is in the files"


@pytest.mark.parametrize("family", ["ernie4_5_moe", "dots1"])
def test_a_routing_bias_is_kept_as_it_is(tmp_path, family):
    """A frozen parameter in one family, a buffer in the other; both in float32 beside weights in bfloat16."""
    student = support.make_other(tmp_path / "base", family, **EXPERTS[family])
    base = load_file(student / "model.safetensors")
    biases = [name for name in base if name.endswith("e_score_correction_bias")]
    assert biases
    for number, name in enumerate(biases):
        base[name] = torch.full_like(base[name], 0.1) + 0.01 * number
    save_file(base, student / "model.safetensors", metadata={"format": "pt"})
    support.begin(tmp_path / "run", support.sums(12), student)
    support.train_here(tmp_path / "run", student, {"max_steps": 2, "dtype": "bfloat16"})
    trained = load_file(tmp_path / "run/student/model.safetensors")
    assert trained.keys() == base.keys()
    assert all(torch.equal(trained[name], base[name]) for name in biases)
    router = [trained[name].dtype for name in trained if name.endswith("mlp.gate.weight")]
    assert set(router) == {torch.float32 if family == "ernie4_5_moe" else torch.bfloat16}
    others = {tensor.dtype for name, tensor in trained.items() if ".gate." not in name and name not in biases}
    assert others == {torch.bfloat16}
    settings = support.make_recipe(student).train
    loaded, empty = model.load(student, settings, torch.float32), model.empty(student, settings, torch.float32)
    frozen = [[name for name, p in each.named_parameters() if not p.requires_grad] for each in (loaded, empty)]
    assert frozen[0] == frozen[1] and len(frozen[0]) == (len(biases) if family == "ernie4_5_moe" else 0)


def test_a_head_that_is_not_all_is_refused_before_anything_is_written(tmp_path):
    student = support.make_other(tmp_path / "base", "hyperclovax", logits_scaling=4.0)
    support.begin(tmp_path / "run", support.sums(4), student)
    with pytest.raises(UserError, match="models of type 'hyperclovax' cannot be trained: their logits are not"):
        support.train_here(tmp_path / "run", student)
    assert not (tmp_path / "run/tokens").exists() and not (tmp_path / "run/checkpoints").exists()


def test_weights_that_are_missing_are_refused(tmp_path):
    student = support.make_other(tmp_path / "base", "gpt_neox")
    config = student / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    support.begin(tmp_path / "run", support.sums(4), student)
    with pytest.raises(UserError, match=r"missing or have another shape: gpt_neox\.layers\.2"):
        support.train_here(tmp_path / "run", student)


def ending(directory):
    """A student with the tokenizer and the template of the built-in one, a third of whose answers end in 12 tokens: the
    last norm's bias is a direction that its output does not have, and only the head's row of the end token reads it."""
    tiny = catalog.folder("student") / "tiny-qwen"
    support.make_other(directory, "gpt_neox", vocab_size=576)
    for file in (*tiny.glob("token*"), *tiny.glob("*.jinja")):
        shutil.copy(file, directory)
    (directory / "card.yaml").unlink()
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias.fill_(0.5)
        model.get_output_embeddings().weight[list(Chat.load(directory).stop_token_ids)] = 0.3
    model.save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("objective", [rollout_support.GRPO, rollout_support.ON_POLICY], ids=["grpo", "on_policy"])
def test_rollouts_are_sampled_by_the_trainers_own_weights_and_resume(tmp_path, capsys, objective):
    student = ending(tmp_path / "base")
    recipe = rollout_support.make_recipe(objective, student=str(student), max_steps=2, save_steps=1)
    rollout_support.train(tmp_path / "whole", recipe)
    printed = " ".join(capsys.readouterr().out.split())
    assert "rollouts: the engine does not compute models of type 'gpt_neox': sampled with transformers" in printed
    assert [line["step"] for line in rollout_support.log(tmp_path / "whole")] == [1, 2]
    step, made = Loop.step, []

    def once(loop):
        if made:
            raise KeyboardInterrupt
        made.append(step(loop))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", once)
        with pytest.raises(KeyboardInterrupt):
            rollout_support.train(tmp_path / "cut", recipe)
    rollout_support.train(tmp_path / "cut", recipe)
    assert rollout_support.weights(tmp_path / "cut") == rollout_support.weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "family, config", [("gpt_neox", {}), pytest.param("qwen3_5_text", support.HYBRID, marks=pytest.mark.slow)]
)
def test_plan_knows_the_family(tmp_path, family, config):
    student = support.make_other(tmp_path / family, family, **config)
    with Run(tmp_path / "run", support.make_recipe(student)) as run:
        ways, _ = plan_training(run.recipe, run.directory, ["1x24GB"], 100, 50)
    assert all(way.memory.activations > 0 for way in ways if way.method == "full")
