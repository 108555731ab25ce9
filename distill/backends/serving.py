"""The commands that start vLLM and SGLang: every flag that distill sets, and how each is chosen.

Flags as documented in 2026: `vllm serve MODEL` and `sglang serve --model-path MODEL`, whose module forms
(`python -m vllm.entrypoints.cli.main serve`, `python -m sglang.launch_server`) run in another Python environment.

The reasoning parser follows from the chat template, because families do not decide it: R1's distilled students are
Qwen2 and Llama models. A wrong parser is silent. R1's takes a whole text without `</think>` for reasoning, so that a
model which does not think gets none; and where the template opens `<think>` itself, the text has only `</think>`, which
without a parser could not be recognized in an answer that was cut off.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.recipe import LaunchedServer

VERSION_SECONDS = 60.0


@dataclass(frozen=True)
class Engine:
    """A server engine. module: the arguments of a Python interpreter that start it. health: a path that answers 200
    once the model is loaded. key_variable: environment variable of the API key; None where it is read from a file only.
    parsers: of R1's, V3.1's and Qwen3's reasoning. The flags' names follow."""

    name: str
    module: tuple[str, ...]
    model: tuple[str, ...]
    health: str
    key_variable: str | None
    parsers: tuple[str, str, str]
    parallel: str
    context: str


ENGINES = {
    "vllm": Engine(
        "vllm",
        ("vllm.entrypoints.cli.main", "serve"),
        (),
        "/health",
        "VLLM_API_KEY",
        ("deepseek_r1", "deepseek_v3", "qwen3"),
        "--tensor-parallel-size",
        "--max-model-len",
    ),
    "sglang": Engine(
        "sglang",
        ("sglang.launch_server",),
        ("--model-path",),
        "/health_generate",
        None,
        ("deepseek-r1", "deepseek-v3", "qwen3"),
        "--tp-size",
        "--context-length",
    ),
}


@dataclass(frozen=True)
class Installed:
    """An engine that was found. start: the command without its flags. python: the interpreter that has it, None where
    that is not known."""

    engine: Engine
    start: tuple[str, ...]
    python: tuple[str, ...] | None

    @classmethod
    def find(cls, settings: LaunchedServer) -> "Installed":
        """Errors: UserError when the engine is not installed where the settings say."""
        engine = ENGINES[settings.launch]
        path = shutil.which(settings.executable or engine.name)
        if path is None and settings.executable:
            raise UserError(f"server.executable: {settings.executable} is not an executable file, nor on PATH")
        if path is None:
            raise UserError(
                f"server.launch: {engine.name} is not installed: there is no command `{engine.name}` on PATH; install "
                f"it (pip install {engine.name}, in an environment of its own) and set server.executable to its "
                f"command or its Python"
            )
        if not Path(path).name.startswith("python"):
            return cls(engine, (path, "serve"), _interpreter(Path(path)))
        installed = cls(engine, (path, "-m", *engine.module), (path,))
        if installed.version is None:
            raise UserError(
                f"server.executable: the Python {path} does not have {engine.name}; install it there "
                f"({path} -m pip install {engine.name}), or name another one"
            )
        return installed

    @property
    def version(self) -> str | None:
        """The installed version; None where it cannot be found out."""
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


def command(
    installed: Installed,
    settings: LaunchedServer,
    directory: Path,
    name: str,
    port: int,
    context: int,
    parallel: int,
    parser: str | None,
) -> list[str]:
    """The whole command. name: of the model in requests. context: tokens of prompt and completion. parallel: GPUs."""
    engine = installed.engine
    flags: dict[str, object] = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": name,
        engine.parallel: parallel,
        engine.context: context,
    }
    if parser is not None:
        flags["--reasoning-parser"] = parser
    trust = ["--trust-remote-code"] if settings.trust_remote_code else []
    pairs = [str(part) for flag in flags.items() for part in flag]
    return [*installed.start, *engine.model, str(directory), *pairs, *trust, *settings.arguments]


def reasoning_parser(engine: Engine, template: str, thinking: bool | None) -> str | None:
    """The parser for a chat template in a mode; None for a model that does not think."""
    r1, v3, qwen3 = engine.parsers
    if thinking is False or ("<think>" not in template and "</think>" not in template):
        return None
    if "enable_thinking" in template:
        return qwen3
    return v3 if _has_variable(template, "thinking") else r1


def parallel_size(directory: Path, gpus: int) -> int:
    """The largest number of GPUs, at most those there are, that divides the model's attention heads; at least one."""
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
    """The Python of a console script, from its first line; None for another kind of executable."""
    with script.open("rb") as file:
        first = file.readline(1024).decode(errors="replace").strip()
    parts: Sequence[str] = first.removeprefix("#!").split() if first.startswith("#!") else ()
    return tuple(parts) if any(Path(part).name.startswith("python") for part in parts) else None
