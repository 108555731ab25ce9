"""`distill filter --on ray` on a cluster of two nodes on this machine: the bytes that one process writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from filter_support import add, make_recipe, make_trace
from test_filters_kill import SETTINGS, begun, output

from distill.filters.pipeline import STAGE
from distill.run import Run

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'distill[ray]'")

pytestmark = pytest.mark.slow  # a cluster takes ten seconds to start, and its workers import everything


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return filtered(begun(tmp_path_factory.mktemp("run") / "alone"), "local")


def filtered(directory: Path, on: str) -> dict[str, bytes]:
    with Run(directory, make_recipe(**SETTINGS), on=on) as run:
        STAGE.perform(run)
    return output(directory)


def actors() -> set[int]:
    """The processes of actors that judge."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Actor"):
                found.add(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def test_two_nodes_write_what_one_process_writes(tmp_path: Path, cluster: Any, alone: dict[str, bytes]) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert filtered(begun(tmp_path / "run"), "ray") == alone


def test_every_filter_gives_the_same_bytes_on_two_nodes(tmp_path: Path, cluster: Any) -> None:
    """Those of the profile `math`, decontamination, and all that compare traces: their notes travel, too."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "What is the sum of twenty and 22 apples?"}\n', encoding="utf-8")
    filters: dict[str, Any] = {
        "profile": "math",
        "correct": {"workers": 1},
        "decontaminate": {"benchmarks": [str(problems)]},
        "length": {"max_tokens": 500, "unit": "student"},
        "pass_rate": {"min_rate": 0.1},
        "near_prompts": True,
        "near_answers": {"threshold": 0.9},
        "select": {"per_prompt": 2, "order": "diverse"},
    }
    line = "Let me check that again, because I am not sure. "
    texts = [
        f"<think>\n{'So 20 and 22 are added, which gives 42 in the end.' if n % 3 else line * 9}\n"
        f"{'Zuerst addieren wir die beiden Zahlen, um die Summe zu finden.' if n % 7 == 0 else f'Case {n}.'}\n"
        f"</think>\nIt is \\boxed{{{42 if n % 5 else 41}}}."
        for n in range(160)
    ]
    questions = ["What is the sum of twenty and 22 apples?", *(f"How many are {n} and {42 - n}?" for n in range(39))]
    traces = [make_trace(text, question=questions[n // 4], sample=n % 4) for n, text in enumerate(texts)]
    outputs = []
    for on in ("local", "ray"):
        recipe = make_recipe(**filters).model_copy(update={"student": "tiny-qwen"})
        with Run(tmp_path / on, recipe, on=on) as run:
            add(tmp_path / on, traces)
            summary = STAGE.perform(run)
        outputs.append(output(tmp_path / on))
    assert all(step.dropped for step in summary.funnel if step.filter in {"repetition", "language", "decontaminate"})
    assert outputs[0] == outputs[1]


def test_a_killed_ray_worker_changes_nothing(
    tmp_path: Path, cluster: Any, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.filters import cluster as cluster_module

    monkeypatch.setattr(cluster_module, "BATCH", 4)
    result, killed = cluster_module._result, set[int]()

    def kill_one(ref: object) -> object:
        done = result(ref)
        if done and len(killed) < 2:
            victim = min(actors() - killed)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        return done

    monkeypatch.setattr(cluster_module, "_result", kill_one)
    assert filtered(begun(tmp_path / "run"), "ray") == alone
    assert len(killed) == 2


def test_a_killed_driver_resumes_on_the_cluster(tmp_path: Path, cluster: Any, alone: dict[str, bytes]) -> None:
    directory = begun(tmp_path / "run")
    code = (
        f"import sys; sys.path[:0] = {sys.path[:1]!r}\nfrom pathlib import Path\n"
        "from distill.filters import cluster\ncluster.BATCH = 4\n"
        "from test_filter_ray import filtered\nfiltered(Path(sys.argv[1]), 'ray')\n"
    )
    environment = os.environ | {
        "RAY_ADDRESS": cluster.address,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    ledger = directory / "filtered" / "verdicts.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(directory)], env=environment) as driver:
        while driver.poll() is None and not (ledger.exists() and ledger.stat().st_size):
            time.sleep(0.001)
        driver.kill()
    assert driver.returncode == -signal.SIGKILL and ledger.stat().st_size
    assert filtered(directory, "ray") == alone
