"""Teachers behind a server only, and what a server is sent for a mode of thinking."""

import json
import re
from pathlib import Path

import pytest

from distill import catalog
from distill.errors import UserError
from distill.models import in_mode


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "kimi-k3", "glm-5.3"])
def test_teachers_with_a_server_only_say_so_in_one_line(name):
    assert catalog.load_teacher(name).server is not None
    with pytest.raises(
        UserError, match=r"names a server and no weights, so .*vLLM, SGLang, llama.cpp, an API"
    ) as caught:
        catalog.resolve_weights("teacher", name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("thinking", "sent"),
    [
        (False, {"thinking": False, "enable_thinking": False}),
        ("high", {"thinking": True, "enable_thinking": True, "reasoning_effort": "high"}),
        ("max", {"thinking": True, "enable_thinking": True, "reasoning_effort": "max"}),
    ],
)
def test_what_a_server_is_sent_for_a_mode(thinking, sent):
    assert in_mode({}, thinking) == {"chat_template_kwargs": sent}
    own = {"chat_template_kwargs": {"reasoning_effort": "low"}}
    assert in_mode(own, thinking)["chat_template_kwargs"] == sent | {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("objective", "server", "logprobs", "message"),
    [
        ({"kind": "on_policy"}, "url", None, None),  # `prompt_logprobs` of the student's own text: nothing is generated
        ({"kind": "on_policy", "student_share": 0.5}, "url", None, "set generate.logprobs"),
        ({"kind": "logits"}, "url", None, "set generate.logprobs"),
        ({"kind": "logits"}, "launch", 4, None),
        ({"kind": "on_policy"}, "launch", 4, r"kind on_policy asks tiny-r1 for .*\(server\.launch\).*remove `server`"),
        (
            {"kind": "on_policy", "teachers": {"math": "mine.yaml"}},
            None,
            None,
            r"asks mine\.yaml for .*remove `server`",
        ),
        ({"kind": "grpo"}, "launch", None, None),
    ],
)
def test_a_served_teacher_gives_what_the_objective_reads(objective, server, logprobs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (catalog.folder("teacher") / "tiny-r1" / "card.yaml").read_text()
    weights = f"weights: {catalog.resolve_weights('teacher', 'tiny-r1')}"
    Path("mine.yaml").write_text(re.sub("weights: .*", weights, card) + "\nserver: {launch: vllm}\n")
    servers = {"url": {"url": "http://127.0.0.1:8000/v1", "model": "m"}, "launch": {"launch": "vllm"}, None: None}
    settings = {"train.objective": objective, "server": servers[server], "generate.logprobs": logprobs}
    asked = catalog.load_recipe("tiny", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    if message is None:
        catalog.check_recipe(asked)
        return
    with pytest.raises(UserError, match=message):
        catalog.check_recipe(asked)
