"""The stage as its users meet it: the student that comes out, what is skipped, and one line for each wrong input."""

import json
import shutil

import pytest
import torch
import train_support as support
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.chat import Chat
from distill.errors import UserError
from distill.run import Run
from distill.train import STAGE
from distill.train.ranks.tensors import State
from distill.train.rows import prepare

SETTINGS = {"max_steps": 4, "logging_steps": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def trained(student, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    summary = support.train_here(start(directory, student), student, SETTINGS)
    return directory, summary


def start(directory, student, traces=None):
    """A run directory in which the filter stage has left its traces."""
    return support.begin(directory, support.sums(24) if traces is None else traces, student)


def afresh(directory, student):
    """`--fresh train`."""
    with Run(directory, support.make_recipe(student)) as run:
        run.fresh([STAGE])


def test_the_student_loads_in_transformers_and_is_the_last_checkpoint(trained):
    directory, _ = trained
    model = AutoModelForCausalLM.from_pretrained(directory / "student")
    assert model.dtype == torch.float32
    learner = torch.nn.Module()
    learner.model = AutoModelForCausalLM.from_pretrained(directory / "student")
    for parameter in learner.parameters():
        parameter.data.zero_()
    State(learner, torch.optim.AdamW(learner.parameters(), fused=True)).load(directory / "checkpoints" / "step-000004")
    for (name, last), written in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(last, written), name


def test_its_chat_template_gives_the_prompt_it_was_trained_on(trained, student):
    directory, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    chat = Chat.load(student, "chatml")
    for trace in support.sums(5):
        ids, prompt_tokens = chat.training_ids(trace.messages)
        question = [dict(m) for m in trace.prompt.messages]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        assert prompt == ids[:prompt_tokens]


def test_its_generation_config_stops_and_samples_as_recommended(trained):
    directory, _ = trained
    config = json.loads((directory / "student" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    assert (config["do_sample"], config["temperature"], config["top_p"]) == (True, 0.6, 0.95)
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_its_card_tells_where_it_comes_from(trained):
    directory, summary = trained
    _, header, body = (directory / "student" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(header)
    assert (front["base_model"], front["license"], front["model_name"]) == ("tiny-test", "mit", "test")
    assert (front["library_name"], "distillation" in front["tags"]) == ("transformers", True)
    assert f"{summary.supervised_tokens:,} in 4 steps" in body and "`tiny-r1`" in body


def test_other_learning_rates_have_the_same_rows(student, tmp_path):
    directory = start(tmp_path / "run", student)
    support.train_here(directory, student, SETTINGS)
    made = (directory / "tokens" / "ids.bin").stat()
    afresh(directory, student)
    support.train_here(directory, student, SETTINGS | {"learning_rate": 1e-4})
    assert (directory / "tokens" / "ids.bin").stat().st_ino == made.st_ino
    afresh(directory, student)
    support.train_here(directory, student, SETTINGS | {"max_length": 200})
    assert (directory / "tokens" / "ids.bin").stat().st_ino != made.st_ino


def test_a_bfloat16_recipe_gives_bfloat16_weights(student, tmp_path):
    directory = start(tmp_path / "run", student)
    support.train_here(directory, student, SETTINGS | {"dtype": "bfloat16"})
    assert AutoModelForCausalLM.from_pretrained(directory / "student").dtype == torch.bfloat16


def test_a_finished_stage_is_not_done_again(trained, student, monkeypatch):
    directory, summary = trained
    monkeypatch.setattr(prepare, "prepare", None)  # calling it would raise
    assert support.train_here(directory, student, SETTINGS) == summary
    assert support.train_here(directory, student, SETTINGS | {"save_steps": 7, "logging_steps": 1}) == summary


@pytest.mark.parametrize("changed", [{"learning_rate": 1e-4}, {"seed": 1}, {"content": "answer"}])
def test_other_settings_are_refused_by_name(trained, student, changed):
    directory, _ = trained
    with pytest.raises(UserError, match=rf"stage train .*{next(iter(changed))}: .*--fresh train"):
        support.train_here(directory, student, SETTINGS | changed)


def test_other_traces_are_refused(trained, student, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(trained[0], directory)
    shutil.rmtree(directory / "filtered")
    (directory / "stages" / "filter.json").unlink()
    start(directory, student, support.sums(23))
    with pytest.raises(UserError, match=r"kept_traces: .*--fresh train"):
        support.train_here(directory, student, SETTINGS)


def test_training_the_answer_alone_never_shows_the_reasoning(student, tmp_path):
    directory = start(tmp_path / "run", student)
    answers = support.train_here(directory, student, SETTINGS | {"content": "answer"})
    assert answers.supervised_tokens_per_epoch == sum(len(t.response) + 1 for t in support.sums(24))


def refused(directory, student, settings=None):
    """The message of the refusal, and the proof that it wrote nothing."""
    with Run(directory, support.make_recipe(student, settings)) as run, pytest.raises(UserError) as caught:
        STAGE.perform(run)
    assert "\n" not in str(caught.value)
    assert not (directory / "stages" / "train.json").exists()
    assert not (directory / "checkpoints").exists() and not (directory / "student").exists()
    return str(caught.value)


def test_no_filtered_traces(student, tmp_path):
    directory = start(tmp_path / "run", student)
    shutil.rmtree(directory / "filtered")
    assert "run `distill filter` first" in refused(directory, student)


def test_an_empty_trace_set(student, tmp_path):
    assert "there are no traces to train on" in refused(start(tmp_path / "run", student, []), student)


def test_a_teacher_that_cannot_be_loaded_leaves_nothing(student, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no such teacher")

    monkeypatch.setattr(prepare, "teach", fail)
    directory = start(tmp_path / "run", student)
    assert refused(directory, student, {"objective": {"kind": "logits"}}) == "no such teacher"
    assert not (directory / "tokens").exists() and not list(directory.glob(".tokens*"))


def test_an_unknown_template(student, tmp_path):
    message = refused(start(tmp_path / "run", student), student, {"chat_template": "alpaca"})
    assert "no chat template 'alpaca'" in message and "chatml, gemma, llama3" in message


@pytest.fixture
def broken(student, tmp_path):
    """A copy of the student to break, and a run directory."""
    copy = tmp_path / "student"
    shutil.copytree(student, copy)
    return copy, start(tmp_path / "run", copy)


def test_truncated_weights(broken):
    student, directory = broken
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} is truncated or not a safetensors file" in refused(directory, student)


def test_missing_weights(broken):
    student, directory = broken
    (student / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(directory, student)


def test_weights_of_another_shape(broken):
    student, directory = broken
    edit(student, hidden_size=64)
    message = refused(directory, student)
    assert "weights that config.json expects have another shape: model.embed_tokens.weight" in message


def test_weights_without_a_layer(broken):
    student, directory = broken
    edit(student, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    assert "expects are missing: model.layers.2.input_layernorm.weight" in refused(directory, student)


def test_a_config_that_contradicts_itself(broken):
    student, directory = broken
    edit(student, num_hidden_layers=3)
    assert "config.json cannot be used" in refused(directory, student)


def test_a_vocabulary_smaller_than_the_tokenizers(broken):
    student, directory = broken
    model = AutoModelForCausalLM.from_pretrained(student)
    model.resize_token_embeddings(200)
    model.save_pretrained(student)
    assert "the model's vocabulary ends at 199" in refused(directory, student)


def edit(student, **changes):
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
