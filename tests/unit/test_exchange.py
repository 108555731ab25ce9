"""Traces out in every format and in again: the same prompt, reasoning and response, byte for byte."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.catalog import load_recipe, load_student, resolve_weights
from distill.chat import split_reasoning
from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.recipe.sources import RunTraces
from distill.traces.configs import READS, template_of, write_config
from distill.traces.exports import export_traces, stored_traces
from distill.traces.imports import import_traces, sources_of
from distill.traces.published import kept_hash, notes_on_run, read_published
from distill.traces.store import read_traces, write_store, write_traces
from distill.traces.trace import Trace

FORMATS = ("messages", "sharegpt", "prompt-completion", "openr1")
SETS = {"think_traces_rg3b_dev": 790, "teacher_records_rasbt": 10, "marco_o1_longcot": 125, "nemo_gym_rollouts": 20}
NONE = {"question": None, "reasoning": None, "response": None, "answer": None}


def bring_in(path: Path, out: Path, notes: list[str] | None = None) -> list[Trace]:
    import_traces(sources_of([str(path)], NONE), out, ([] if notes is None else notes).append)
    return [trace for trace, _ in read_traces(out / "traces")]


def content(traces: list[Trace]) -> Counter:
    return Counter(
        (repr(t.prompt), t.text, t.reasoning, t.response, t.finish_reason, t.seed, t.teacher) for t in traces
    )


def through(traces: list[Trace], form: str, kind: str, directory: Path) -> list[Trace]:
    file = directory / f"{form}.{kind}"
    export_traces(((trace, []) for trace in traces), form, file, kind)
    return bring_in(file, directory / f"{form}-{kind}")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SETS)
def test_real_traces_come_back_from_every_format(name, real_data, tmp_path):
    import datasets

    notes: list[str] = []
    traces = bring_in(real_data(name), tmp_path / "in", notes)
    assert len(traces) == SETS[name]
    if name == "teacher_records_rasbt":
        files = sorted(real_data(name).glob("*.json"))
        rows = [row for file in files for row in json.loads(file.read_text())]
        assert [(t.reasoning, t.response, t.prompt.answer) for t in traces] == [
            (row["message_thinking"].strip(), row["message_content"].strip(), row["gtruth_answer"]) for row in rows
        ]
    if name == "think_traces_rg3b_dev":
        files = [real_data(name) / f"{part}.jsonl" for part in ("gsm8k", "mixed")]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert [(t.reasoning, t.response) for t in traces] == [split_reasoning(row["response"]) for row in rows]
    if name == "marco_o1_longcot":
        rows = json.loads((real_data(name) / "CoT_demo.json").read_text())
        for trace, row in zip(traces, rows, strict=True):
            thought, _, answer = row["response"].removeprefix("<Thought>").partition("</Thought>")
            assert trace.reasoning == thought.strip()
            assert trace.response == answer.strip().removeprefix("<Output>").removesuffix("</Output>").strip()
    if name == "nemo_gym_rollouts":
        assert any("5 of 5 answers are left out: no answer at the end (5" in note for note in notes)
        calls = [t for t in traces if any("<tool_call>" in m["content"] for m in t.prompt.messages)]
        assert len(calls) == 4 and all("<tool_response>" in t.prompt.messages[-1]["content"] for t in calls)
        assert sum(not trace.response for trace in traces) == 5  # published without a text
    for form in FORMATS:
        for kind in ("jsonl", "parquet"):
            assert content(through(traces, form, kind, tmp_path)) == content(traces)
            loader = "json" if kind == "jsonl" else kind
            file, cache = str(tmp_path / f"{form}.{kind}"), str(tmp_path / "cache")
            loaded = datasets.load_dataset(loader, data_files=file, split="train", cache_dir=cache)
            rows_expected = len({t.prompt.id for t in traces}) if form == "openr1" else len(traces)
            assert len(loaded) == rows_expected


PIECES = st.sampled_from(
    [*("<think>", "</think>", "<Thought>", "</Thought>", "<Output>", "[THINK]", "[/THINK]", "◁think▷", "\n", " ", "\r"),
     *("<|begin_of_thought|>", "<answer>", "[1, 2]", '{"a": 1}', "\u2028", "é", "\x00", "思考", "```")]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=7).map("".join)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXTS.filter(str.strip), TEXTS, TEXTS | st.none()), min_size=1, max_size=5))
@pytest.mark.parametrize("form", FORMATS)
def test_any_trace_comes_back(form, rows, tmp_path_factory):
    traces = []
    for number, (question, text, system) in enumerate(rows):
        messages = [{"role": "user", "content": question}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        reasoning, response = split_reasoning(text)
        traces.append(
            Trace(Prompt(tuple(messages), "math", None, "made"), number, number, text, reasoning, response, None, "t")
        )
    for kind in ("jsonl", "parquet"):
        assert content(through(traces, form, kind, tmp_path_factory.mktemp("t"))) == content(traces)


def test_a_reasoning_that_splitting_would_not_give_comes_back(tmp_path):
    trace = Trace(
        Prompt.from_question("q", "4"), 0, 3, "a</think>b", None, "a</think>b", "length", "t", completion_tokens=9
    )
    for form in FORMATS:
        (back,) = through([trace], form, "jsonl", tmp_path)
        assert (back.reasoning, back.response, back.completion_tokens) == (None, "a</think>b", 9)


def test_half_a_surrogate_pair_is_left_out_and_counted(tmp_path):
    whole = Trace(Prompt.from_question("q", None), 0, 0, "a", None, "a", None, "t")
    half = Trace(Prompt.from_question("q", None), 1, 0, "\ud800", None, "\ud800", None, "t")
    notes: list[str] = []
    export_traces([(whole, []), (half, [])], "messages", tmp_path / "a.jsonl", "jsonl", notes.append)
    assert notes == ["note: 1 trace left out: the text holds half a surrogate pair"]
    with pytest.raises(UserError, match="nothing to export"):
        export_traces([(half, [])], "messages", tmp_path / "b.jsonl", "jsonl", notes.append)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


OPENR1 = {
    "problem": "2+2?", "answer": "4", "source": "olympiads", "uuid": "u1", "solution": "s" * 300,
    "generations": ["<think>\na\n</think>\n\n4", "<think>\nb"], "finish_reasons": ["stop", "length"],
    "is_reasoning_complete": [True, False], "correctness_math_verify": [True, False], "correctness_llama": None,
    "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
}  # fmt: skip


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_openr1_says_of_each_generation_is_stored_and_comes_back(tmp_path):
    notes: list[str] = []
    file = write(tmp_path / "openr1.jsonl", OPENR1)
    traces = bring_in(file, tmp_path / "in", notes)
    assert [(t.reasoning, t.response, t.finish_reason) for t in traces] == [("a", "4", "stop"), (None, "", "length")]
    judged = [verdicts[0] for _, verdicts in read_traces(tmp_path / "in/traces")]
    assert [v.reason for v in judged] == ["labelled correct", "labelled incorrect"]
    assert [v.evidence["correctness_math_verify"] for v in judged] == [True, False]
    assert judged[0].evidence["source"] == "olympiads" and judged[0].evidence["uuid"] == "u1"
    assert notes == ["note: not stored: the columns solution"]
    export_traces(stored_traces(tmp_path / "in"), "openr1", tmp_path / "out.jsonl", "jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    for column in [name for name in row if name in OPENR1 and name not in ("source", "uuid", "messages")]:
        assert row[column] == OPENR1[column]
    assert content(list(read_published(RunTraces(kind="run", path=str(tmp_path / "in"))))) == content(traces)


@pytest.mark.parametrize("column", ["finish_reasons", "correctness_math_verify", "is_reasoning_complete"])
def test_lists_of_another_length_than_generations_are_refused(column, tmp_path):
    file = write(tmp_path / "a.jsonl", OPENR1, OPENR1 | {column: [None]})
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {column} has length 1, and there are 2 generations"):
        bring_in(file, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "turn",
    [
        *({"content": "4", key: "a"} for key in ("reasoning_content", "reasoning", "thinking", "thought")),
        {"content": "4", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]},
        {"content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "4"}]},
        {"content": [{"type": "reasoning", "text": "a"}, {"type": "output_text", "text": "4"}]},
    ],
)  # fmt: skip
def test_every_key_of_a_reasoning(turn, tmp_path):
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", **turn}], "num_tokens": 7}
    (trace,) = bring_in(write(tmp_path / "a.jsonl", row), tmp_path / "in")
    assert (trace.reasoning, trace.response) == ("a", "4")
    ((_, (verdict,)),) = read_traces(tmp_path / "in/traces")
    assert verdict.evidence["num_tokens"] == 7


def test_all_of_it_in_the_reasoning(tmp_path):
    row = {"prompt": "q", "completion": "", "reasoning": "a"}
    (trace,) = bring_in(write(tmp_path / "a.jsonl", row), tmp_path / "in")
    assert (trace.reasoning, trace.response) == ("a", "")


def test_a_changed_export_is_refused_with_its_place(tmp_path):
    trace = Trace(Prompt.from_question("q", "4"), 0, 0, "a", None, "a", "stop", "t")
    export_traces([(trace, [])], "messages", tmp_path / "a.jsonl", "jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    row["distill"]["seed"] = "seven"
    with pytest.raises(UserError, match="b.jsonl, line 1: the column distill does not fit the others"):
        bring_in(write(tmp_path / "b.jsonl", row), tmp_path / "in")


KILLED = """
import os, signal, sys
from pathlib import Path
from distill.prompts.prompt import Prompt
from distill.traces.exports import export_traces
from distill.traces.trace import Trace
def traces():
    for i in range(1000):
        if i == 700:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Trace(Prompt.from_question(str(i), None), 0, 0, "a", None, "a", None, "t"), []
export_traces(traces(), "messages", Path(sys.argv[1]), sys.argv[1].rpartition(".")[2])
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_killed_export_leaves_no_half_file(kind, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / f"a.{kind}")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / f"a.{kind}").exists()


def command(*arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code = "from distill.command import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_commands(tmp_path):
    file = write(tmp_path / "openr1.jsonl", OPENR1)
    done = command("import", file, "--out", tmp_path / "in")
    assert done.returncode == 0 and "2 traces of 1 prompt " in done.stdout + done.stderr, done.stderr
    again = command("import", file, "--out", tmp_path / "in")
    assert again.returncode == 2 and "exists already" in again.stderr
    shown = command("traces", tmp_path / "in")
    assert "published: labelled incorrect" in shown.stdout
    out = tmp_path / "a.jsonl"
    done = command("export", tmp_path / "in", "--out", out, "--config", "trl", "--student", "qwen2.5-0.5b")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "a.trl.yaml").read_text())["model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    for arguments, message in {
        ("--out", out): "exists already; choose another --out, or replace it with --force",
        ("--out", tmp_path / "a.txt"): "name a .jsonl or .parquet file",
        ("--out", tmp_path / "b.jsonl", "--config", "trl"): "--config needs a student",
        ("--out", tmp_path / "b.jsonl", "--format", "sharegpt", "--config", "trl"): "cannot read --format sharegpt",
    }.items():
        done = command("export", tmp_path / "in", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize("trainer", READS)
@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.1-8b"])
def test_configurations_keep_the_reasoning(trainer, name, tmp_path):
    import jinja2

    (tmp_path / "dataset_info.json").write_text('{"theirs": {"file_name": "b.jsonl"}}')
    for form in READS[trainer]:
        out = tmp_path / "a.jsonl"
        files = write_config(
            trainer, out, form, "jsonl", load_student(name), "weights", load_student(name).chat_template
        )
        values = yaml.safe_load(files[0].read_text())
        assert "weights" in (values.get("model_name_or_path"), values.get("base_model"))
        if trainer == "llama-factory":
            registered = json.loads((tmp_path / "dataset_info.json").read_text())
            assert registered["theirs"] == {"file_name": "b.jsonl"}, "an entry of another data set stays"
            entry = registered[values["dataset"]]
            assert entry["columns"] == {"messages": "conversations" if form == "sharegpt" else "messages"}
            continue
        from distill.chat.worker import GenerationBlock

        template = jinja2.Environment(extensions=[GenerationBlock]).from_string((tmp_path / "a.jinja").read_text())
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}]
        whole = template.render(messages=turns, bos_token="", add_generation_prompt=False)
        prompt = template.render(messages=turns[:1], bos_token="", add_generation_prompt=True)
        assert whole.startswith(prompt + "<think>\na\n</think>\n\nb<|")


def test_the_template_of_a_configuration(tmp_path):
    """The recipe's or the card's; else the checkpoint's own, where its turns are those of one that is written."""
    student = load_student("qwen2.5-0.5b").model_copy(update={"chat_template": None})
    assert template_of(student, "llama3", None) == "llama3"
    for file, text, form in (
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ '<|im_start|>' }}"}), "chatml"),
        ("chat_template.jinja", "{{ '<|start_header_id|>' }}", "llama3"),
    ):
        (tmp_path / file).write_text(text)
        assert template_of(student, None, tmp_path) == form
    (tmp_path / "chat_template.jinja").write_text("{{ '[INST]' }}")
    for named, directory in (("gemma", None), (None, None), (None, tmp_path)):
        with pytest.raises(UserError, match="--config writes the chat templates chatml and llama3, and "):
            template_of(student, named, directory)


@pytest.mark.slow
def test_a_configuration_has_the_length_of_the_longest_phase(tmp_path):
    recipe = load_recipe("tiny-r1-pipeline")
    phases = {training.max_length for training in recipe.train.trainings}
    assert command("import", write(tmp_path / "openr1.jsonl", OPENR1), "--out", tmp_path / "in").returncode == 0
    (tmp_path / "in" / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    done = command("export", tmp_path / "in", "--out", tmp_path / "a.jsonl", "--config", "trl")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "a.trl.yaml").read_text())["max_length"] == max(phases) < recipe.train.max_length


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_step_of_trl(form, kind, tmp_path):
    """On every format; with the template of the written configuration where it is for TRL."""
    texts = [f"<think>\n{i}\n</think>\n\n{i + 1}" for i in range(4)]
    traces = [Trace(Prompt.from_question(t, "1"), 0, 0, t, *split_reasoning(t), "stop", "t") for t in texts]
    assert "<think>\n0\n</think>" in trl_step(traces, form, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SETS)
def test_a_step_of_trl_on_real_traces(name, form, real_data, tmp_path):
    """The shortest traces, whose text the tiny student's rows hold whole. NeMo Gym's rollouts have no reasoning."""
    traces = sorted(bring_in(real_data(name), tmp_path / "in"), key=lambda trace: len(trace.text))
    reasons = name != "nemo_gym_rollouts"
    whole = [trace for trace in traces if bool(trace.reasoning) == reasons and trace.response][:4]
    assert whole[0].response[-20:] in trl_step(whole, form, "jsonl", tmp_path)


def trl_step(traces: list[Trace], form: str, kind: str, directory: Path) -> str:
    """Export the traces, and train the tiny student on them for a step; returns the first row as it is trained on."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    file = directory / f"a.{kind}"
    export_traces(((trace, []) for trace in traces), form, file, kind)
    loaded = datasets.load_dataset(
        "json" if kind == "jsonl" else kind, data_files=str(file), split="train", cache_dir=str(directory / "cache")
    )
    student = load_student("tiny-qwen")
    options: dict[str, object] = {"max_length": student.context}
    if form in READS["trl"]:
        values = yaml.safe_load(
            write_config("trl", file, form, kind, student, "w", student.chat_template)[0].read_text()
        )
        names = ("chat_template_path", "completion_only_loss", "assistant_only_loss", "eos_token", "max_length")
        options = {key: values[key] for key in names if key in values}
        loaded = loaded.select_columns(values["datasets"][0]["columns"])
    weights = str(resolve_weights("student", "tiny-qwen"))
    arguments = SFTConfig(
        output_dir=str(directory / "out"), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", **options
    )
    trainer = SFTTrainer(
        model=weights, args=arguments, train_dataset=loaded, processing_class=AutoTokenizer.from_pretrained(weights)
    )
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    result = trainer.train()
    assert result.global_step == 1 and 0 < result.training_loss < 100
    return text


def test_calls_of_tools_and_earlier_reasoning_are_kept(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "why"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (trace,) = bring_in(write(tmp_path / "a.jsonl", {"messages": turns}), tmp_path / "in")
    assert trace.prompt.messages[1]["content"] == "<think>\nwhy\n</think>\n\na"
    assert trace.text == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_a_score_is_no_verdict(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "score": score} for score in (1, 5)]
    bring_in(write(tmp_path / "a.jsonl", *rows), tmp_path / "in")
    said = [verdicts[0] for _, verdicts in read_traces(tmp_path / "in/traces")]
    assert [(v.reason, v.evidence["score"]) for v in said] == [("not labelled", 1), ("not labelled", 5)]


def test_the_current_directory_is_no_output(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", OPENR1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="the current directory"):
        bring_in(file, Path("."))


def test_an_import_is_hashed_as_what_a_run_kept_and_other_directories_are_refused(tmp_path):
    bring_in(write(tmp_path / "a.jsonl", OPENR1), tmp_path / "in")
    assert kept_hash(tmp_path / "in") and notes_on_run(tmp_path / "in") == []
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="distill filter"):
        notes_on_run(tmp_path / "other")
    assert "there is no run" in notes_on_run(tmp_path / "nowhere")[0]


def test_all_says_what_was_not_filtered(tmp_path):
    traces = [Trace(Prompt.from_question("q", "4"), n, 0, "a", None, "a", "stop", "t") for n in range(3)]
    write_store(tmp_path / "traces", traces)
    write_traces(tmp_path / "filtered/kept", traces[:1])
    write_traces(tmp_path / "filtered/dropped", traces[1:2])
    notes: list[str] = []
    assert len(list(stored_traces(tmp_path, True, notes.append))) == 2
    assert notes == ["note: 1 stored trace not filtered and not exported; run `distill filter` first"]
