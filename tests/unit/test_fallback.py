"""Models that the engine does not compute are sampled with transformers: the same draws, and scores that say so."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import rollout_support
import train_support as support
from eval_support import distill, scores, sums

from distill import backends, catalog
from distill.backends.collect import trace_of
from distill.backends.fallback import TransformersBackend
from distill.backends.local import LocalBackend
from distill.engine.options import SamplingParams
from distill.eval import evaluate_model
from distill.evaluations import read_results
from distill.models import Model
from distill.prompts.prompt import Prompt
from distill.recipe import Eval, LocalEngine

__all__ = ["sums"]

ENGINE = LocalEngine(device="cpu", dtype="float32")
QUESTIONS = ("What is 2 + 3?", "Add 17, 4 and 20; what is the sum?", "1+1?")
JOBS = [backends.Job(Prompt.from_question(text, None), (0, 1)) for text in QUESTIONS]
SAMPLING = SamplingParams(temperature=1.2, top_p=0.95, max_new_tokens=24, logprobs=3)
OTHERS = {  # RecurrentGemma reads padding, RWKV the other sequences of a batch
    "gpt_neox": {},
    "qwen3_5_text": support.HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32},
}


def tiny_qwen(directory):
    return Model("student", shutil.copytree(catalog.folder("student") / "tiny-qwen", directory))


def other(directory, family):
    """A model whose template is `chatml`."""
    return Model("other", support.make_other(directory, family, **OTHERS[family]), template="chatml")


def answers(backend, jobs=JOBS, sampling=SAMPLING, seed=5):
    return {(done.prompt.id, done.sample): done for done in backend.complete(jobs, sampling, seed)}


@pytest.mark.parametrize("budget", [None, 6])
def test_a_family_of_the_engine_gets_the_engines_own_answers(tmp_path, budget):
    """Sampled tokens, ends, probabilities and alternatives."""
    model = tiny_qwen(tmp_path / "m")
    sampling = SamplingParams(temperature=1.2, top_p=0.95, max_new_tokens=40, logprobs=3, thinking_budget=budget)
    ours = answers(TransformersBackend.load(model, ENGINE, 4), sampling=sampling)
    theirs = answers(LocalBackend.load(model, ENGINE, 4), sampling=sampling)
    assert ours.keys() == theirs.keys()
    for key, done in theirs.items():
        mine = ours[key]
        assert mine.completion_token_ids == done.completion_token_ids and mine.text == done.text
        assert (mine.finish_reason, mine.prompt_token_ids) == (done.finish_reason, done.prompt_token_ids)
        assert mine.logprobs == pytest.approx(done.logprobs, abs=1e-4)
        assert [[i for i, _ in row] for row in mine.top_logprobs] == [[i for i, _ in row] for row in done.top_logprobs]
    assert {done.finish_reason for done in ours.values()} & {"stop"}, "an end token ends a sample"


@pytest.mark.parametrize("family", OTHERS)
def test_a_sample_does_not_depend_on_its_batch_and_scores_as_it_was_drawn(tmp_path, family):
    backend = TransformersBackend.load(other(tmp_path / "m", family), ENGINE, 8)
    together = answers(backend)
    assert len(together) == 6
    alone = answers(backend, JOBS[1:2])
    for key, done in alone.items():
        assert together[key].completion_token_ids == done.completion_token_ids
    traces = [trace_of(done, done.prompt, 5, "t") for done in together.values()]
    for trace, scored in zip(traces, backend.scored(traces, 3), strict=True):
        assert scored.completion_ids == trace.completion_token_ids
        assert scored.logprob_t.tolist() == pytest.approx(list(trace.logprobs), abs=1e-4)
        assert scored.top_id_tk[0].tolist() == [token for token, _ in trace.top_logprobs[0]]


def test_defaults_of_the_directory_do_not_change_the_samples(tmp_path):
    """A repetition penalty in generation_config.json would."""
    model = other(tmp_path / "m", "gpt_neox")
    plain = answers(TransformersBackend.load(model, ENGINE, 8))
    (tmp_path / "m/generation_config.json").write_text('{"repetition_penalty": 9.0, "max_length": 3, "top_k": 1}')
    assert {k: v.text for k, v in answers(TransformersBackend.load(model, ENGINE, 8)).items()} == {
        k: v.text for k, v in plain.items()
    }


def test_scores_say_which_engine_gave_them(sums, tmp_path, monkeypatch, capsys):
    student = support.make_other(tmp_path / "m", "gpt_neox")
    shutil.copy(catalog.folder("student") / "tiny-qwen/chat_template.jinja", student)
    asked = ["eval", "--model", student, "--benchmark", sums, "--out", tmp_path / "out", "--max-new-tokens", 8]
    assert distill(monkeypatch, *asked, "--limit", 2) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "m: the engine does not compute models of type 'gpt_neox': sampled with transformers, which is slower" in (
        printed
    )
    settings = scores(tmp_path / "out", model="m").settings
    numerics = {key.rpartition(".")[2]: value for key, value in settings.items() if ".numerics." in key}
    assert numerics["kernels"] == "transformers" and numerics["attention"] == "sdpa"
    assert numerics["transformers"].startswith("5.") and numerics["activations"] == "bfloat16"


def test_weights_that_are_missing_are_one_line(sums, tmp_path, monkeypatch, capsys):
    student = support.make_other(tmp_path / "m", "gpt_neox")
    config = student / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    shutil.copy(catalog.folder("student") / "tiny-qwen/chat_template.jinja", student)
    assert distill(monkeypatch, "eval", "--model", student, "--benchmark", sums, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "weights that config.json expects are missing or have another shape: gpt_neox.layers.2" in error
    assert error.count("\n") == 1 and not list((tmp_path / "out").rglob("*.json*"))


def evaluate(student: Path, card: Path, directory: Path) -> None:
    recipe = Eval(benchmarks=(str(card),), max_batch=4, max_new_tokens=6)
    evaluate_model(str(student), "m", recipe, ENGINE, directory)


def victim(*arguments: Path) -> None:
    rollout_support.dying(("distill.traces.store:TraceStore", "append"), 6)
    evaluate(*arguments)


@pytest.mark.slow
def test_a_killed_evaluation_draws_the_same_samples(sums, tmp_path):
    student = support.make_other(tmp_path / "m", "gpt_neox")
    shutil.copy(catalog.folder("student") / "tiny-qwen/chat_template.jinja", student)
    process = multiprocessing.get_context("spawn").Process(
        target=victim, args=(student, sums, tmp_path / "killed"), daemon=True
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    evaluate(student, sums, tmp_path / "killed")
    evaluate(student, sums, tmp_path / "whole")
    killed, whole = (read_results(tmp_path / name / "sums/m") for name in ("killed", "whole"))
    assert killed.samples == whole.samples and killed.scores.samples == 16
    assert killed.scores.settings == whole.scores.settings
