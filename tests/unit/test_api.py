"""The Python API: reading a run, grading an answer, sampling a model. What it reads is compared with the stores."""

import asyncio
import json
import shutil
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import pytest
from run_support import rewritten
from server_support import listening

import distill
from distill import Run, api, catalog, grade, load_recipe, open_model
from distill.api import OpenModel
from distill.artefacts import RunPaths, Scores
from distill.errors import UserError
from distill.integrity import record_files
from distill.recipe import SamplingSettings
from distill.record import StageRecord
from distill.traces.store import TraceStore, read_traces, write_traces


@pytest.fixture
def run(tiny_run):
    return Run(tiny_run)


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of the finished run, to damage."""
    return shutil.copytree(tiny_run, tmp_path / "tiny")


def flip(path, at=-40):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- the package


def test_the_package_lists_its_api_and_refuses_other_names():
    assert set(distill.__all__) <= set(dir(distill))
    with pytest.raises(AttributeError, match="no attribute 'open_mind'"):
        _ = distill.open_mind


def test_a_recipe_is_loaded_with_overrides():
    assert load_recipe("tiny", ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4


# ---- traces


def test_kept_and_dropped_traces_are_those_of_the_store(run, tiny_run):
    for kept, folder in ((True, "kept"), (False, "dropped")):
        stored = list(read_traces(tiny_run / "filtered" / folder))
        dataset = run.traces(kept=kept)
        assert dataset["text"][:] == [trace.text for trace, _ in stored]
        assert dataset["tokens"][:] == [len(trace.completion_token_ids) for trace, _ in stored]
        assert dataset["messages"][:] == [trace.messages for trace, _ in stored]
        reasons = [next((f"{v.filter}: {v.reason}" for v in verdicts if not v.keep), "kept") for _, verdicts in stored]
        assert dataset["verdict"][:] == reasons
        assert set(reasons) == ({"kept"} if kept else {"dedup: duplicate"})


def test_all_traces_are_the_kept_and_the_dropped_ones(run):
    assert run.traces()["verdict"][:] == [*run.traces(kept=True)["verdict"], *run.traces(kept=False)["verdict"]]
    assert len(run.traces()) == 24


def test_traces_before_the_filter(copied, tiny_run):
    RunPaths(copied).record("filter").unlink()
    dataset = Run(copied).traces()
    assert dataset["text"][:] == [trace.text for trace in TraceStore(tiny_run / "traces")]
    assert set(dataset["verdict"]) == {"not filtered"}
    with pytest.raises(UserError, match="stage filter is not finished; run `distill filter`"):
        Run(copied).traces(kept=True)


def test_a_run_that_dropped_nothing(copied):
    paths = RunPaths(copied)
    write_traces(paths.dropped, [])
    files = record_files(copied, [*paths.kept.glob("*.parquet"), *paths.dropped.glob("*.parquet")])
    rewritten(paths.record("filter"), StageRecord, files=files)
    assert len(Run(copied).traces(kept=False)) == 0
    assert set(Run(copied).traces()["verdict"]) == {"kept"}


@pytest.mark.parametrize("name", ["filtered/kept/part-00000.parquet", "filtered/dropped/part-00000.parquet"])
def test_a_damaged_trace_file_is_refused(copied, name):
    flip(copied / name)
    with pytest.raises(UserError, match=f"{name} has changed .* `distill filter --verify`"):
        Run(copied).traces()


# ---- scores, log, summaries


def test_scores_are_one_row_a_model(run, tiny_run):
    table = run.scores()
    assert list(table["model"]) == ["base", "student", "teacher"]
    for row in table.to_dict("records"):
        stored = json.loads((tiny_run / "eval" / "tiny-arithmetic" / row["model"] / "scores.json").read_text())
        for key in ("pass@1", "low", "high"):
            name = key if key == "pass@1" else f"pass@1_{key}"
            assert row[name] == stored["pass@1"]["value" if key == "pass@1" else key]
        assert row["pass@2"] == stored["pass@k"]["2"]["value"]
        assert row["cons@2_high"] == stored["cons@k"]["2"]["high"]
        assert row["truncated_rate"] == stored["truncated_rate"]


def test_instructions_and_sources_have_columns_of_their_own(tiny_run):
    text = json.loads((tiny_run / "eval" / "tiny-arithmetic" / "student" / "scores.json").read_text())
    text.pop("sha256")
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    four = dict.fromkeys(("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"), share)
    text |= {"instructions": four, "parts": {"nov": {"problems": 3, "pass@1": share}}}
    row = api._row(Scores.model_validate_json(json.dumps(text)))
    assert (row["prompt_strict"], row["instruction_loose_high"], row["pass@1/nov_low"]) == (0.5, 0.75, 0.25)
    assert "instructions" not in row and "parts" not in row


def test_the_log_is_one_row_a_step(run, copied):
    assert list(run.log()["step"]) == [1, 2, 3, 4]
    assert run.log()["loss"].iloc[-1] == run.summary("train").last_loss
    path = RunPaths(copied).log
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert len(Run(copied).log()) == 4
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"log\.jsonl is damaged"):
        Run(copied).log()


def test_summaries(run, copied):
    assert run.summary("generate").traces == run.summary("filter").total == 24
    assert run.summary("eval").scores[2].model == "teacher"
    with pytest.raises(UserError, match="unknown stage 'grade'; expected one of generate, filter, train, eval"):
        run.summary("grade")
    RunPaths(copied).record("eval").unlink()
    with pytest.raises(UserError, match="stage eval is not finished; run `distill eval`"):
        Run(copied).scores()
    RunPaths(copied).log.unlink()
    with pytest.raises(UserError, match=r"log\.jsonl is missing"):
        Run(copied).log()


def test_damaged_and_foreign_directories_are_refused(copied, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        Run(tmp_path)
    flip(RunPaths(copied).record("train"), at=200)
    with pytest.raises(UserError, match=r"train\.json is damaged; `distill train --fresh train`"):
        Run(copied).summary("train")
    flip(RunPaths(copied).recipe, at=10)
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged"):
        Run(copied)


# ---- grading


@pytest.mark.parametrize(
    ("answer", "gold", "task", "verdict"),
    [
        (r"The answer is \boxed{\frac{1}{2}}.", "0.5", "math", "correct"),
        ("<think>It is 8.</think> \\boxed{7}", "8", "math", "wrong"),
        (r"<think>\boxed{8}", "8", "math", "unverifiable"),
        ("9^{9^{9^{9}}}", "3", "math", "unverifiable"),
        ("Answer: B", "B", "choice", "correct"),
    ],
)
def test_an_answer_is_graded(answer, gold, task, verdict):
    assert grade(answer, gold, task).verdict == verdict


def test_a_task_without_a_grader_is_refused():
    with pytest.raises(UserError, match="task 'chat' has no grader"):
        grade("hello", "hello", "chat")


@pytest.mark.parametrize(("answer", "gold", "name"), [(None, "1", "answer"), ("1", 2, "gold")])
def test_what_is_no_text_is_not_graded(answer, gold, name):
    with pytest.raises(UserError, match=f"grade: {name} is a .*give it as text"):
        grade(answer, gold)


# ---- sampling


def test_the_teacher_answers_and_repeats_itself():
    with open_model("tiny-r1", engine=load_recipe("tiny").engine) as model:
        answers = model.sample("What is 17 + 25 - 8?", n=2, temperature=0.6)
        assert model.sample([{"role": "user", "content": "What is 17 + 25 - 8?"}], n=2, temperature=0.6) == answers
        (short,) = model.sample("What is 17 + 25 - 8?", max_new_tokens=5)
        with pytest.raises(UserError, match="temperature"):
            model.sample("What is 1 + 1?", temperature=-1.0)
    assert [grade(answer.text, "34").verdict for answer in answers] == ["correct", "correct"]
    assert all("17 + 25 = 42" in (answer.reasoning or "") for answer in answers)
    assert all(answer.response.endswith(r"\boxed{34}.") and answer.finish_reason == "stop" for answer in answers)
    assert (short.finish_reason, short.tokens, short.reasoning) == ("length", 5, None)


@pytest.mark.parametrize("name", ["tiny-qwen", "student", "card.yaml"])
def test_students_directories_and_cards_are_opened(name, tiny_run, tmp_path):
    place = {"student": tiny_run / "student", "card.yaml": tmp_path / "card.yaml"}.get(name, name)
    if name == "card.yaml":
        catalog.copy("teacher", "tiny-r1", tmp_path / "card.yaml")
    with open_model(place, engine=load_recipe("tiny").engine) as model:
        (answer,) = model.sample("What is 3 + 4?", max_new_tokens=4, temperature=0)
    assert answer.text and (answer.tokens or 0) <= 4


class Recording:
    """A backend that keeps what it is asked."""

    max_context = 100

    def __init__(self):
        self.calls = []

    def check(self, prompts, sampling):
        self.calls.append(("check", [prompt.messages for prompt in prompts], sampling))

    def complete(self, jobs, sampling, seed):
        self.calls.append(("complete", [job.prompt.messages for job in jobs], sampling))
        return iter(())


def recording(**settings):
    model = SimpleNamespace(place=None)
    return OpenModel(model, Recording(), SamplingSettings(**settings), lambda function: function())


def test_the_thinking_budget_of_a_card_is_asked_for_and_every_question_is_checked_first():
    """A started server reserves the context of what is checked."""
    model = recording(thinking_budget=7)
    for limit in (16, 50):
        model.sample("1 + 1?", max_new_tokens=limit)
    calls = model._backend.calls
    assert [name for name, _, _ in calls] == ["check", "complete"] * 2
    assert [sampling.max_new_tokens for _, _, sampling in calls] == [16, 16, 50, 50]
    assert {sampling.thinking_budget for _, _, sampling in calls} == {7}


@pytest.mark.parametrize(
    ("question", "n", "message"),
    [
        ([{"content": "x"}], 1, "message 1 is .*give its role"),
        ([{"role": "user", "content": None}], 1, "message 1 is .*content, a text"),
        ([{"role": "human", "content": "x"}], 1, r"\(system, user, assistant\)"),
        (["x"], 1, "message 1 is 'x'"),
        (5, 1, "the question is 5"),
        ([], 1, r"the question is \[\]"),
        ("x", 0, "n is 0; it is a number of answers, at least 1"),
    ],
)
def test_what_is_no_question_is_refused(question, n, message):
    model = recording()
    with pytest.raises(UserError, match=message):
        model.sample(question, n, max_new_tokens=8)
    assert not model._backend.calls


def test_an_unknown_model_is_refused():
    with (
        pytest.raises(UserError, match=r"tiny-r2: no teacher or student has that name.*tiny-r1"),
        open_model("tiny-r2"),
    ):
        pass
    with pytest.raises(UserError, match="no/such"), open_model("no/such"):
        pass


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server with one model and one answer."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": ""}]})

    def do_POST(self):
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "reasoning_content": "six times seven", "content": "42"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        self.reply(whole | {"usage": usage})

    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_server_answers_also_inside_the_event_loop_of_a_notebook():
    def ask(server):
        with open_model(f"http://127.0.0.1:{server.server_port}/v1") as model:
            return model.sample("6 × 7?", n=2, max_new_tokens=64)

    async def cell(server):
        return ask(server)

    with listening(Server) as server:
        answers = ask(server)
        assert asyncio.run(cell(server)) == answers
    assert [(a.reasoning, a.response, a.finish_reason, a.tokens) for a in answers] == [
        ("six times seven", "42", "stop", 7)
    ] * 2
    assert server.asked["max_tokens"] == 64
