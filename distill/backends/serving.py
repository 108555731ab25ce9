"""The commands that start vLLM and SGLang: which flags distill sets, and how it chooses their values.

Flags as documented in 2026: `vllm serve MODEL` and `sglang serve --model-path MODEL`. With another Python the modules
behind them are run: `python -m vllm.entrypoints.cli.main serve` and `python -m sglang.launch_server`.

The reasoning parser follows from the chat template, because the architecture does not decide it: R1's distilled
students are Qwen2 and Llama models. A wrong parser is a silent error. R1's parser takes a text without `</think>` for
reasoning, which leaves a model that does not think without an answer. And where the template opens `<think>` itself,
the text has only `</think>`, so that without a parser a truncated text is not recognized as reasoning.
"""

import json
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from distill.errors import UserError
from distill.recipe import LaunchedServer
from distill.thinking import Thinking

VERSION_SECONDS = 60.0  # for a Python interpreter that reports the version of a package


@dataclass(frozen=True)
class Engine:
    """A server engine and its command-line interface.

    module: arguments with which a Python interpreter starts it. model_flag: arguments before the model directory.
    health: path that answers 200 when the model is loaded. key_variable: environment variable of the API key; None for
    an engine that reads the key from a configuration file. parsers: names of the reasoning parsers of R1, V3.1 and
    Qwen3. parallel_flag, context_flag: flags of the tensor parallel size and the context. budget_flags: flags without
    which thinking budgets of requests are ignored.
    """

    name: str
    module: tuple[str, ...]
    model_flag: tuple[str, ...]
    health: str
    key_variable: str | None
    parsers: tuple[str, str, str]
    parallel_flag: str
    context_flag: str
    budget_flags: tuple[str, ...] = ()


VLLM = Engine(
    name="vllm",
    module=("vllm.entrypoints.cli.main", "serve"),
    model_flag=(),
    health="/health",
    key_variable="VLLM_API_KEY",
    parsers=("deepseek_r1", "deepseek_v3", "qwen3"),
    parallel_flag="--tensor-parallel-size",
    context_flag="--max-model-len",
)
SGLANG = Engine(
    name="sglang",
    module=("sglang.launch_server",),
    model_flag=("--model-path",),
    health="/health_generate",
    key_variable=None,
    parsers=("deepseek-r1", "deepseek-v3", "qwen3"),
    parallel_flag="--tp-size",
    context_flag="--context-length",
    budget_flags=("--enable-strict-thinking",),
)
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG)}


@dataclass(frozen=True)
class Installed:
    """An engine that is installed on this machine. start: its command, without flags. python: the interpreter that has
    it, with its arguments; None if unknown."""

    engine: Engine
    start: tuple[str, ...]
    python: tuple[str, ...] | None

    @classmethod
    def find(cls, settings: LaunchedServer) -> "Installed":
        """Find the engine's command. Errors: UserError when it is not installed where the settings say."""
        engine = ENGINES[settings.launch]
        name = settings.executable or engine.name
        path = shutil.which(str(Path(name).expanduser()) if name.startswith("~") else name)
        if path is None and settings.executable:
            raise UserError(
                f"server.executable: {settings.executable} is neither an executable file nor a command on PATH; set it "
                f"to the command `{engine.name}`, or to a Python that has {engine.name}"
            )
        if path is None:
            raise UserError(
                f"server.launch: there is no command `{engine.name}` on PATH; install {engine.name} (pip install "
                f"{engine.name}, in an environment of its own), and set server.executable to that environment's "
                f"`{engine.name}` or Python"
            )
        if not Path(path).name.startswith("python"):
            return cls(engine, (path, "serve"), _interpreter(Path(path)))
        installed = cls(engine, (path, "-m", *engine.module), (path,))
        if installed.version is None:
            raise UserError(
                f"server.executable: the Python {path} does not have {engine.name}; install it ({path} -m pip install "
                f"{engine.name}), or set server.executable to another Python"
            )
        return installed

    @cached_property
    def version(self) -> str | None:
        """The installed version; None if it is unknown."""
        if self.python is None:
            return None
        code = f"from importlib.metadata import version; print(version({self.engine.name!r}))"
        try:
            done = subprocess.run(
                [*self.python, "-c", code], capture_output=True, text=True, timeout=VERSION_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None


@dataclass(frozen=True)
class Flags:
    """Values that distill chooses. name: of the model in requests. context: tokens of prompt and completion. parallel:
    GPUs. parser: of the reasoning; None for a model that does not think. budget: whether requests have a thinking
    budget."""

    name: str
    port: int
    context: int
    parallel: int
    parser: str | None
    budget: bool


def command(installed: Installed, settings: LaunchedServer, directory: Path, flags: Flags) -> list[str]:
    """Return the whole command for the model in `directory`. The user's arguments come last and so take precedence."""
    engine = installed.engine
    pairs = {
        "--host": "127.0.0.1",
        "--port": flags.port,
        "--served-model-name": flags.name,
        engine.parallel_flag: flags.parallel,
        engine.context_flag: flags.context,
    }
    if flags.parser is not None:
        pairs["--reasoning-parser"] = flags.parser
    switches = list(engine.budget_flags) if flags.budget else []
    if settings.trust_remote_code:
        switches.append("--trust-remote-code")
    values = [str(part) for pair in pairs.items() for part in pair]
    return [*installed.start, *engine.model_flag, str(directory), *values, *switches, *settings.arguments]


def reasoning_parser(engine: Engine, template: str, thinking: Thinking | None) -> str | None:
    """Return the parser for a chat template in a mode; None for a model that does not think."""
    r1, v3, qwen3 = engine.parsers
    if thinking is False or ("<think>" not in template and "</think>" not in template):
        return None
    if "enable_thinking" in template:
        return qwen3
    return v3 if _has_variable(template, "thinking") else r1


def parallel_size(directory: Path, gpus: int) -> int:
    """Return the largest number, at most `gpus`, that divides the model's attention heads; at least 1."""
    heads = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("num_attention_heads")
    if not isinstance(heads, int):
        return max(1, gpus)
    return max((size for size in range(1, gpus + 1) if heads % size == 0), default=1)


def _has_variable(template: str, name: str) -> bool:
    """Whether a template reads a variable that its caller may set."""
    import jinja2
    from jinja2 import meta

    from distill.chat.worker import GenerationBlock

    try:
        tree = jinja2.Environment(extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError:
        return False
    return name in meta.find_undeclared_variables(tree)


def _interpreter(script: Path) -> tuple[str, ...] | None:
    """Return the Python of a console script, from its first line; None for another kind of executable.

    Installers write a path that is too long for a first line, or has a space, into the second:
    `'''exec' "/a long path/python" "$0" "$@"` below `#!/bin/sh`.
    """
    with script.open("rb") as file:
        first, second = (file.readline(4096).decode(errors="replace").strip() for _ in range(2))
    if not first.startswith("#!"):
        return None
    parts = first.removeprefix("#!").split()
    if second.startswith("'''exec' "):
        parts = shlex.split(second)[1:2]
    return tuple(parts) if any(Path(part).name.startswith("python") for part in parts) else None
