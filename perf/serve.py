"""`distill serve` against the engine without a server and `transformers serve`: one model, one machine, one run.

    python perf/serve.py MODEL [--json FILE] [--clients N] [--rounds N] [--new N] [--prompt N] [--skip-transformers]

MODEL is a model directory or a name of the catalog. The clients are a process of their own on the same cores, with
plain sockets: a client library costs more time than the server for a small model. Each asks for one completion after
another, of exactly `--new` tokens (the end token is ignored). The engine without a server has the same requests in one
call. Server and engine take turns for several rounds; figures are medians, in generated tokens a second.

`transformers serve` runs as it starts by default and once with continuous batching, with as many requests as it answers
in a minute: it ends a text at the end token, so its tokens are counted from its usage.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEXT = "a train leaves the station at noon and counts apples while it adds numbers two three five seven and so on"
WORDS = TEXT.split()


def question(number: int, words: int) -> str:
    """A text of so many words, different for each number."""
    return " ".join([str(number), *(WORDS[(number + i) % len(WORDS)] for i in range(words))])


# ---- the clients


async def ask(host: str, port: int, body: dict[str, object]) -> tuple[int, float, float]:
    """One request on a connection of its own. Returns completion tokens, seconds to the first byte of the body, and
    seconds in all."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        + data
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise SystemExit(f"{head.decode()}{(await reader.read(2000)).decode()}")
    first = b""
    while b"data:" not in first and b"{" not in first:
        first += await reader.read(1 << 16)
    at_first = time.perf_counter() - begun
    content = first + await reader.read()
    writer.close()
    usage = re.findall(rb'"completion_tokens": ?(\d+)', content)
    if not usage:
        raise SystemExit(f"no usage in {content[-300:]!r}")
    return int(usage[-1]), at_first, time.perf_counter() - begun


async def load(
    host: str, port: int, body: dict[str, object], clients: int, requests: int, words: int
) -> dict[str, float]:
    numbers = iter(range(requests))
    answers: list[tuple[int, float, float]] = []

    async def client() -> None:
        for number in numbers:
            messages = [{"role": "user", "content": question(number, words)}]
            answers.append(await ask(host, port, body | {"messages": messages}))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {
        "tokens_per_second": sum(tokens for tokens, _, _ in answers) / seconds,
        "requests_per_second": len(answers) / seconds,
        "first_token_seconds": statistics.median(first for _, first, _ in answers),
        "request_seconds": statistics.median(whole for _, _, whole in answers),
        "longest_request_seconds": max(whole for _, _, whole in answers),
    }


def measure(address: str, body: dict[str, object], clients: int, requests: int, words: int) -> dict[str, float]:
    """`load` in a process of its own."""
    job = json.dumps([address, body, clients, requests, words])
    done = subprocess.run([sys.executable, __file__, "--clients-job", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


# ---- the servers


@contextmanager
def server(command: list[str], pattern: str, log: Path) -> Iterator[str]:
    """Start a server and wait for its address, host:port, in its output."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(600):
            if match := re.search(pattern, log.read_text()):
                yield match[1]
                return
            if process.poll() is not None:
                break
            time.sleep(0.2)
        raise SystemExit(f"{command}: {log.read_text()}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def ours(directory: Path, batch: int, log: Path):
    command = [sys.executable, "-m", "distill.command", "serve", str(directory), "--port", "0", "--name", "m"]
    return server([*command, "--max-batch", str(batch)], r"http://(\S+?)/v1", log)


def theirs(directory: Path, port: int, log: Path, *more: str):
    command = [shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"]
    command += ["serve", "--host", "127.0.0.1", "--port", str(port), "--log-level", "info", *more]
    return server(command, rf"(?:running on|Uvicorn).*?(127\.0\.0\.1:{port})", log)


def offline(directory: Path, batch: int, requests: int, words: int, new: int) -> float:
    """Tokens a second of the engine with the same requests, in a process of its own."""
    job = json.dumps([str(directory), batch, requests, words, new])
    done = subprocess.run([sys.executable, __file__, "--offline-job", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


def run_offline(directory: str, batch: int, requests: int, words: int, new: int) -> float:
    from distill import backends
    from distill.engine import Request, SamplingParams
    from distill.models import Model
    from distill.recipe import LocalEngine

    with backends.open(Model("m", Path(directory)), LocalEngine(), batch) as backend:
        params = SamplingParams(temperature=0.7, max_new_tokens=new)

        def tokens(numbers: range) -> int:
            ids = backend.chat.prompts_ids([{"role": "user", "content": question(n, words)}] for n in numbers)
            made = (Request(str(n), tuple(prompt), params, 0, n, (0,)) for n, prompt in zip(numbers, ids, strict=True))
            total = 0
            for done in backend.engine.generate(made):
                backend.chat.decode(done.token_ids)
                total += len(done.token_ids)
            return total

        tokens(range(batch))  # what is lazy is loaded
        begun = time.perf_counter()
        return tokens(range(requests)) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/serve"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=100, help="words of a question")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--clients-job")
    parser.add_argument("--offline-job")
    given = parser.parse_args()
    if given.clients_job:
        address, body, clients, requests, words = json.loads(given.clients_job)
        host, port = address.rsplit(":", 1)
        print(json.dumps(asyncio.run(load(host, int(port), body, clients, requests, words))))
        return
    if given.offline_job:
        print(run_offline(*json.loads(given.offline_job)))
        return
    from distill.serve import model_of

    directory = model_of(given.model).directory.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    load_ = (given.clients, given.requests, given.prompt)
    body: dict[str, object] = {"max_tokens": given.new, "temperature": 0.7, "ignore_eos": True}
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    rounds: list[dict[str, object]] = []
    for _ in range(given.rounds):
        alone = offline(directory, given.clients, given.requests, given.prompt, given.new)
        with ours(directory, given.clients, given.work / "ours.log") as address:
            measure(address, body, given.clients, given.clients, given.prompt)  # the first requests load what is lazy
            whole, stream = measure(address, body, *load_), measure(address, streamed, *load_)
        rounds.append({"offline": alone, "whole": whole, "stream": stream})
        print(json.dumps(rounds[-1]), flush=True)
    figures: dict[str, object] = {
        "model": given.model,
        "clients": given.clients,
        "rounds": rounds,
        "offline": statistics.median(r["offline"] for r in rounds),
        "serve": statistics.median(r["whole"]["tokens_per_second"] for r in rounds),
        "serve_streaming": statistics.median(r["stream"]["tokens_per_second"] for r in rounds),
        "serve_share": statistics.median(r["whole"]["tokens_per_second"] / r["offline"] for r in rounds),
        "serve_streaming_share": statistics.median(r["stream"]["tokens_per_second"] / r["offline"] for r in rounds),
    }
    if not given.skip_transformers:
        plain: dict[str, object] = {"model": str(directory), "max_tokens": given.new, "temperature": 0.7}
        streamed_plain = plain | {"stream": True, "stream_options": {"include_usage": True}}
        both = (("transformers", ()), ("transformers_continuous_batching", ("--continuous-batching",)))
        for number, (name, more) in enumerate(both):
            with theirs(directory, 8391 + number, given.work / f"{name}.log", *more) as address:
                for kind, wanted in (("", plain), ("_streaming", streamed_plain)):
                    try:
                        measure(address, plain, 1, 2, given.prompt)  # loads the model
                        figures[name + kind] = measure(address, wanted, given.clients, given.clients, given.prompt)
                    except SystemExit as failure:  # it may refuse, as continuous batching does without a GPU
                        figures[name + kind] = str(failure)[-300:]
                    print(name + kind, json.dumps(figures[name + kind]), flush=True)
    print(json.dumps(figures, indent=2))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
