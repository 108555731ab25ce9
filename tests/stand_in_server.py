"""A stand-in for the commands `vllm` and `sglang`: strict about flags, with a worker process, and faults by STAND_IN.

Faults: `dies` at the start, `deaf` (never healthy), `stubborn` (ignores SIGTERM, as does its worker), `quits:N` (ends
when N requests were answered). Its processes write their ids to the file STAND_IN_PIDS.
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

FAULT = os.environ.get("STAND_IN", "")
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def flags():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--host", "--served-model-name", "--reasoning-parser"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    if Path(sys.argv[0]).name == "sglang":
        parser.add_argument("--model-path", required=True)
        parser.add_argument("--config", type=Path, required=True)
        parser.add_argument("--tp-size", type=int)
        parser.add_argument("--context-length", type=int)
    else:
        parser.add_argument("model")
        parser.add_argument("--tensor-parallel-size", type=int)
        parser.add_argument("--max-model-len", type=int)
    assert sys.argv[1] == "serve"
    return parser.parse_args(sys.argv[2:])


def main():
    given = flags()
    sglang = hasattr(given, "config")
    key = given.config.read_text().split()[1] if sglang else os.environ["VLLM_API_KEY"]
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
            if self.path == ("/health_generate" if sglang else "/health"):
                ready = FAULT != "deaf" and time.monotonic() - started > 0.3
                self.send({}, 200 if ready else 503)
            elif self.headers["Authorization"] != f"Bearer {key}":
                self.send({}, 401)
            else:
                owner = "sglang" if sglang else "vllm"
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
