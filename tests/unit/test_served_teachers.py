"""Teachers behind a server only, and what a server is sent for a mode of thinking."""

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
