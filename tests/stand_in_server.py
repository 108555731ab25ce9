"""A stand-in for vLLM and SGLang, as commands and as modules: strict about flags, with a worker process.

STAND_IN chooses a fault: `dies` at the start, `deaf` (never healthy), `stubborn` (ignores SIGTERM, as does its worker),
`quits:N` (ends at request N). Its processes write their ids to the file STAND_IN_PIDS.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SGLANG = "sglang" in Path(sys.argv[0]).parts[-2:]  # bin/sglang or sglang/launch_server.py
FAULT = os.environ.get("STAND_IN", "")
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def flags():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--host", "--served-model-name", "--reasoning-parser"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    if SGLANG:
        parser.add_argument("--enable-strict-thinking", action="store_true")
        parser.add_argument("--model-path", required=True)
        parser.add_argument("--config", type=Path, required=True)
        parser.add_argument("--tp-size", type=int)
        parser.add_argument("--context-length", type=int)
    else:
        parser.add_argument("model")
        parser.add_argument("--tensor-parallel-size", type=int)
        parser.add_argument("--max-model-len", type=int)
    arguments = sys.argv[1:]
    if Path(sys.argv[0]).name != "launch_server.py":
        assert arguments.pop(0) == "serve"
    return parser.parse_args(arguments)


def main():
    given = flags()
    key = given.config.read_text().split('"')[1] if SGLANG else os.environ["VLLM_API_KEY"]
    assert len(key) >= 32 and key not in " ".join(sys.argv)
    print(f"loading with key {key}", flush=True)
    if FAULT == "dies":
        sys.exit("out of memory")
    worker = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)  # not even of its group
    with open(os.environ["STAND_IN_PIDS"], "a") as file:
        file.write(f"{os.getpid()}\n{worker.pid}\n")
    if FAULT == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started, lock, answered = time.monotonic(), threading.Lock(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.headers["Authorization"] != f"Bearer {key}":
                self.send({}, 401)
            elif self.path == ("/health_generate" if SGLANG else "/health"):
                ready = FAULT != "deaf" and time.monotonic() - started > 0.3
                self.send({}, 200 if ready else 503)
            else:
                owner = "sglang" if SGLANG else "vllm"
                self.send({"object": "list", "data": [{"id": given.served_model_name, "owned_by": owner}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == given.served_model_name
            if self.headers["Authorization"] != f"Bearer {key}":
                return self.send({}, 401)
            with lock:
                answered.append(1)
                if f"quits:{len(answered)}" == FAULT:
                    print("CUDA error", flush=True)
                    os._exit(3)
            time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
            message = {"role": "assistant", "content": "So \\boxed{4}.", "reasoning": "twice two"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
            return self.send({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

        def send(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
