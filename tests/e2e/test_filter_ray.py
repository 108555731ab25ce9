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
    from test_filters import make_recipe

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
