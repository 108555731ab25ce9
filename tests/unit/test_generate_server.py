"""A recipe whose teacher is behind a server: what it asks for, what it stores, what it refuses."""

import json
from pathlib import Path

import pytest
import yaml
from eval_support import distill, right, server, url

from distill import catalog
from distill.models import Server, teacher_of
from distill.recipe import TeacherServer
from distill.traces.store import TraceStore

KEY = "sk-a-key-of-many-characters"
CARD = {
    "name": "served",
    "family": "deepseek_v3",
    "parameters": 671,
    "active_parameters": 37,
    "context": 163840,
    "license": "mit",
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """`recipe(server, **changes)` writes a recipe with eight problems whose teacher is behind that server."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(server, **changes):
        content = {
            "name": "served",
            "teacher": "deepseek-r1",
            "student": "tiny-qwen",
            "server": server,
            "prompts": [{"kind": "file", "path": "sums.jsonl"}],
            "generate": {"samples": 2, "sampling": {"max_new_tokens": 64}},
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
        (tmp_path / "served.yaml").write_text(yaml.safe_dump(content | changes))
        return "served.yaml"

    return write


def at(script, **more):
    return {"url": url(script), "model": "scripted"} | more


def traces():
    return sorted(TraceStore(Path("runs/served/traces")), key=lambda trace: trace.key)


def test_the_server_answers_every_sample_once_and_more_samples_ask_for_the_missing_ones(recipe, monkeypatch, capsys):
    with server(right) as script:
        assert distill(monkeypatch, "generate", recipe(at(script))) == 0
        assert len(script.asked) == 16 == len({asked["seed"] for asked in script.asked})
        first = traces()
        assert distill(monkeypatch, "generate", "served.yaml") == 0 and len(script.asked) == 16
        assert "nothing to do" in capsys.readouterr().out
        assert distill(monkeypatch, "generate", "served.yaml", "--set", "generate.samples=4") == 0
        assert len(script.asked) == 32
    assert [trace for trace in traces() if trace.sample < 2] == first and len(traces()) == 32
    trace = next(trace for trace in first if "3 + 3" in trace.prompt.messages[-1]["content"])
    assert (trace.reasoning, trace.response) == ("twice 3", "So it is \\boxed{6}.")
    assert trace.completion_tokens == 7 and trace.finish_reason == "stop"


def test_another_address_is_the_same_teacher_and_another_model_is_not(recipe, monkeypatch, capsys):
    with server(right) as script:
        assert distill(monkeypatch, "generate", recipe(at(script))) == 0
    with server(right) as script:
        moved = recipe(at(script, concurrency=2), generate={"samples": 3, "sampling": {"max_new_tokens": 64}})
        assert distill(monkeypatch, "generate", moved) == 0 and len(script.asked) == 8
        capsys.readouterr()
        for change in ({"extra_body": {"min_p": 0.1}}, {"model": "other"}):
            assert distill(monkeypatch, "generate", recipe(at(script) | change)) == 2
            assert "teacher." in capsys.readouterr().err
        assert len(script.asked) == 8


def test_further_fields_and_the_thinking_mode_are_in_every_request(recipe, tmp_path, monkeypatch):
    with server(lambda question, seed: (right(question, seed)[0][1], "stop")) as script:  # as asked, without reasoning
        card = CARD | {"thinking": False, "server": at(script, extra_body={"min_p": 0.1})}
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
        assert distill(monkeypatch, "generate", recipe(None, teacher="./card.yaml")) == 0
        variables = {"thinking": False, "enable_thinking": False}
        assert len(script.asked) == 16
        assert all(asked["min_p"] == 0.1 and asked["chat_template_kwargs"] == variables for asked in script.asked)


def test_what_the_recipe_says_of_template_variables_wins():
    named = TeacherServer(url="http://x/v1", model="m", extra_body={"chat_template_kwargs": {"thinking": True, "a": 1}})
    kwargs = Server.of(named, thinking=False).extra_body["chat_template_kwargs"]
    assert kwargs == {"thinking": True, "enable_thinking": False, "a": 1}
    assert Server.of(TeacherServer(url="http://x/v1", model="m"), None).extra_body == {}


def test_the_recipes_server_comes_before_the_cards(tmp_path):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(CARD | {"server": {"url": "http://a/v1", "model": "a"}}))
    card = str(tmp_path / "card.yaml")
    assert teacher_of("teacher", card).place.model == "a"
    assert teacher_of("teacher", card, TeacherServer(url="http://b/v1", model="b")).place.model == "b"


def test_settings_that_a_server_refuses_may_be_corrected_before_the_first_trace(recipe, monkeypatch, capsys):
    with server(lambda question, seed: 400) as script:
        assert distill(monkeypatch, "generate", recipe(at(script, extra_body={"min_p": 7}))) == 2
        assert "refused the request" in capsys.readouterr().err
    with server(right) as script:
        assert distill(monkeypatch, "generate", recipe(at(script, extra_body={"min_p": 0.1}))) == 0
        assert len(traces()) == 16
        assert distill(monkeypatch, "generate", recipe(at(script, extra_body={"min_p": 0.2}))) == 2  # now it is not
    assert "teacher.extra_body" in capsys.readouterr().err


def test_the_key_is_sent_and_is_in_no_file_and_no_message(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with server(right) as script:
        assert distill(monkeypatch, "generate", recipe(at(script, api_key_env="TEACHER_KEY"))) == 0
        assert set(script.keys) == {f"Bearer {KEY}"}
    with server(lambda question, seed: 401) as script:
        refused = recipe(at(script, api_key_env="TEACHER_KEY"))
        assert distill(monkeypatch, "generate", refused, "--fresh", "generate") == 2
    printed = capsys.readouterr()
    assert "set TEACHER_KEY to a valid one" in printed.err and KEY not in printed.err + printed.out
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("server_changes", "changes", "message"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, {}, "server.api_key_env: the environment variable NO_SUCH_KEY is not set"),
        ({"api_key_env": "sk-123"}, {}, "server.api_key_env: should be the name of an environment variable"),
        (
            {"model": "other"},
            {},
            "no model 'other' (Error code: 404 - scripted); choose one with --name, or in a recipe with server.m",
        ),
        ({"url": "http://127.0.0.1:9/v1"}, {}, "no model server answers there"),
        ({"url": "nowhere"}, {}, "should be an OpenAI-compatible address"),
        (
            {},
            {"train": {"objective": {"kind": "logits"}}},
            "train.objective.kind logits reads the teacher's probabilities",
        ),
        ({"model": ""}, {}, "server.model"),
        ({"modle": "m"}, {}, "did you mean server.model?"),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(server_changes, changes, message, recipe, monkeypatch, capsys):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def reply(question, seed):
        return 404 if seed is None else right(question, seed)

    with server(reply) as script:
        name = recipe(at(script) | server_changes, **changes)
        assert distill(monkeypatch, "run" if changes else "generate", name) == 2
        error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "sk-123" not in error
    assert not Path("runs").exists() and not any("seed" in asked for asked in script.asked)


def test_a_card_needs_weights_or_a_server(tmp_path, monkeypatch, capsys):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(CARD))
    assert distill(monkeypatch, "teachers", "check", tmp_path / "card.yaml") == 2
    assert "one of `weights` and `server` is needed" in capsys.readouterr().err
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(CARD | {"server": {"url": "http://a/v1", "model": "a"}}))
    assert distill(monkeypatch, "teachers", "check", tmp_path / "card.yaml") == 0
    with pytest.raises(Exception, match="names a server and no weights, so .* use that server, or another"):
        catalog.resolve_weights("teacher", str(tmp_path / "card.yaml"))


@pytest.mark.parametrize(
    ("content", "reasoning", "response"),
    [
        ("<think>\nsum\n</think>\n\n4", "sum", "4"),
        ("sum\n</think>\n\n4", "sum", "4"),
        ("4", None, "4"),
        (("sum", ""), None, ""),
    ],
)
def test_every_form_of_reasoning_is_stored_with_both_tags(content, reasoning, response, recipe, monkeypatch):
    with server(lambda question, seed: (content, "stop")) as script:
        assert distill(monkeypatch, "generate", recipe(at(script))) == 0
    (trace, *_) = traces()
    assert (trace.reasoning, trace.response) == (reasoning, response)
    assert ("<think>" in trace.text) == (content != "4")


@pytest.mark.parametrize(
    ("content", "thought", "settings", "said"),
    [
        ("4", 0, {}, "missing"),
        ("4", 90, {}, "hidden"),
        ("<think>sum</think>4", 0, {}, None),
        ("4", 0, {"format": None}, None),
    ],
)
def test_a_teacher_without_reasoning_is_said_before_all_is_paid_for(
    content, thought, settings, said, recipe, monkeypatch, capsys
):
    monkeypatch.setattr("distill.generate.WATCHED", 5)
    monkeypatch.setattr("eval_support.USAGE", {"completion_tokens_details": {"reasoning_tokens": thought}})
    with server(lambda question, seed: (content, "stop")) as script:
        assert distill(monkeypatch, "generate", recipe(at(script, concurrency=1), filter=settings)) == 0
    out = capsys.readouterr().out
    note = "note: none of the first 5 answers has reasoning"
    assert out.count(note) == (said is not None)
    if said == "hidden":
        assert f"{note}, though the provider counts its tokens: it is hidden, and the filter `format` drops such" in out
    elif said:
        assert "if the teacher is to think, set its server's field for thinking in server.extra_body, or set" in out
    assert ("reasoning: 16 without any" in out) == (content == "4")


def test_all_stages_with_a_teacher_behind_a_server(recipe, monkeypatch, capsys):
    """The teacher is evaluated through its server, too."""
    changes = {
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 256, "dtype": "float32"},
        "eval": {"benchmarks": ["tiny-arithmetic"], "models": ["student", "teacher"], "limit": 3, "max_batch": 8},
    }

    def reply(question, seed):
        return right(question, seed) if question.startswith("What is") else ("\\boxed{1}", "stop")

    with server(reply) as script:
        assert distill(monkeypatch, "run", recipe(at(script), **changes)) == 0
        assert len(script.asked) == 16 + 3
        assert distill(monkeypatch, "run", "served.yaml") == 0
    assert len(script.asked) == 19 and "nothing to do" in capsys.readouterr().out
    assert Path("runs/served/report.html").is_file()
