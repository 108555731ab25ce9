"""The whole way at small counts: four stages, what they leave on the disk, and what a second run does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from distill.chat import Chat
from distill.errors import UserError
from distill.pipeline import run_recipe
from distill.prompts.arithmetic import problems
from distill.recipe import Recipe
from distill.traces.store import TraceStore, read_traces

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "small"
    run_recipe(small_recipe, directory)
    return directory


def contents(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}


def test_every_prompt_and_sample_is_there_once(finished: Path, small_recipe: Recipe) -> None:
    traces = list(TraceStore(finished / "traces"))
    questions = {p.question for p in problems("train", 0, 40)}
    assert {t.prompt.messages[0]["content"] for t in traces} == questions
    assert sorted(t.sample for t in traces) == sorted([0, 1] * 40)
    assert len({t.key for t in traces}) == 80
    for trace in traces:
        assert trace.text.startswith("<think>\n"), "the prefilled tag was not put back"
        assert trace.logprobs is not None and len(trace.logprobs) == len(trace.completion_token_ids)


def test_kept_and_dropped_are_all_traces_with_verdicts(finished: Path) -> None:
    kept = list(read_traces(finished / "filtered" / "kept"))
    dropped = list(read_traces(finished / "filtered" / "dropped"))
    assert len(kept) + len(dropped) == 80
    assert all(verdict.keep for _, verdicts in kept for verdict in verdicts)
    assert all(any(not v.keep for v in verdicts) for _, verdicts in dropped)
    assert all(int(trace.prompt.answer or "") == int(trace.response.split("{")[1].split("}")[0]) for trace, _ in kept)


def test_the_kept_traces_read_as_a_dataset(finished: Path) -> None:
    files = [str(path) for path in (finished / "filtered" / "kept").glob("*.parquet")]
    rows = load_dataset("parquet", data_files=files, split="train")
    roles = [message["role"] for message in rows[0]["messages"]]
    assert roles == ["user", "assistant"]
    assert "</think>" in rows[0]["messages"][1]["content"]


def test_the_student_loads_in_transformers_and_is_asked_as_it_was_trained(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    trace, _ = next(iter(read_traces(finished / "filtered" / "kept")))
    trained, prompt = Chat.load(finished / "student").training_ids(trace.messages)
    asked = tokenizer.apply_chat_template(trace.messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert trained[:prompt] == list(asked)
    assert max(trained) < model.get_input_embeddings().num_embeddings
    assert model.generation_config.eos_token_id in ([trained[-1]], trained[-1])


def test_scores_are_there_for_base_student_and_teacher(finished: Path) -> None:
    for model in ("base", "student", "teacher"):
        scores = json.loads((finished / "eval" / "tiny-arithmetic" / model / "scores.json").read_text(encoding="utf-8"))
        assert scores["problems"] == 12
        estimate = scores["pass@1"]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1


def test_the_report_is_one_file_that_asks_for_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "tiny-arithmetic" in page
    assert 'src="http' not in page and 'href="http' not in page and "@import" not in page


def test_a_second_run_does_nothing_and_says_so(
    finished: Path, small_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    run_recipe(small_recipe, finished)
    assert "nothing to do" in capsys.readouterr().out
    assert contents(finished) == before


def test_a_finished_run_is_recognised_without_torch(finished: Path, recipe_file: Callable[..., Path]) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom distill.catalog import load_recipe\n"
        "from distill.pipeline import run_recipe\n"
        "run_recipe(load_recipe(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(recipe_file()), str(finished)], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "change, stages, message",
    [
        ({"prompts": {"limit": 41}}, None, "stage generate has work left .* --fresh train"),
        ({"train": {"max_steps": 25}}, ["eval"], "stage train was run with other settings .*max_steps: 24 → 25"),
        ({"generate": {"logprobs": 2}}, ["filter"], "stage generate was run with other settings"),
        ({"eval": {"seed": 7}}, ["train"], "stage eval was run with other settings"),
    ],
)
def test_a_recipe_that_contradicts_any_stage_is_refused_and_nothing_is_touched(
    finished: Path, small_recipe: Recipe, change: dict[str, Any], stages: list[str] | None, message: str
) -> None:
    raw = small_recipe.model_dump(mode="json")
    for section, values in change.items():
        (raw[section][0] if section == "prompts" else raw[section]).update(values)
    before = contents(finished)
    with pytest.raises(UserError, match=message):
        run_recipe(Recipe.model_validate_json(json.dumps(raw)), finished, stages=stages)
    assert contents(finished) == before


def test_more_samples_extend_the_ledger_and_keep_what_is_there(
    small_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small_recipe.model_copy(update={"prompts": (small_recipe.prompts[0].model_copy(update={"limit": 6}),)})
    run_recipe(first, tmp_path / "run", stages=["generate"])
    before = {trace.key: trace for trace in TraceStore(tmp_path / "run" / "traces")}
    more = small_recipe.model_copy(
        update={
            "prompts": (small_recipe.prompts[0].model_copy(update={"limit": 9}),),
            "generate": small_recipe.generate.model_copy(update={"samples": 3}),
        }
    )
    run_recipe(more, tmp_path / "run", stages=["generate"])
    after = {trace.key: trace for trace in TraceStore(tmp_path / "run" / "traces")}
    assert len(before) == 12 and len(after) == 27
    assert {key: after[key] for key in before} == before


def test_real_questions_that_the_tiny_teacher_cannot_answer_are_judged_not_crashed_on(
    real_data: Callable[[str], Path], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    from distill.catalog import load_recipe

    path = real_data("gsm8k/test.jsonl")
    source = {"kind": "file", "path": str(path), "question": "question", "answer": "answer", "limit": 20}
    recipe = load_recipe(str(recipe_file(prompts=[source], generate={"sampling": {"max_new_tokens": 256}})))
    run_recipe(recipe, tmp_path / "run", stages=["generate"])
    from distill.grading import Grader

    traces = list(TraceStore(tmp_path / "run" / "traces"))
    assert len(traces) == 20
    with Grader() as grader:
        grades = [grade.verdict for _, grade in grader.grade((t.key, t.prompt, t.response) for t in traces)]
    print({verdict: grades.count(verdict) for verdict in ("correct", "wrong", "unverifiable")})
    assert len(grades) == 20
    assert set(grades) <= {"wrong", "unverifiable"}
