"""`--on ray` without Ray, and with addresses where no cluster is: one line, at once, and nothing written."""

import re
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from filter_support import add, make_recipe, make_trace

from distill import __version__
from distill.errors import UserError
from distill.filters import cluster
from distill.filters.cluster import require_ray
from distill.filters.pipeline import STAGE
from distill.filters.resources import judges_identity
from distill.run import Run


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'distill\[ray\]', on every node"):
        require_ray()


@pytest.mark.parametrize(
    "address", ["head", "head:", ":6379", "head:70000", "head:port", "ray://head:10001", "http://h:1"]
)
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"RAY_ADDRESS is '.*'; set it to HOST:PORT of the cluster's head node"):
        require_ray()


def test_nothing_is_written_where_no_cluster_answers(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    with Run(tmp_path / "run", make_recipe(), on="ray") as run:
        add(tmp_path / "run", [make_trace()])
        with pytest.raises(UserError, match=r"no cluster answers at 127.0.0.1:\d+ .*correct or unset RAY_ADDRESS"):
            STAGE.perform(run)
        assert not run.paths.filtered.exists() and not run.begun("filter")


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_ray_looks_for_a_cluster_itself(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    require_ray()


def test_an_address_where_something_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        require_ray()


# ---- versions


def actor() -> cluster.Actor:
    recipe = make_recipe()
    job = cluster.Job(
        recipe=recipe, directory="/no/such/directory", tasks=("math",), identity=judges_identity(recipe, ["math"])
    )
    return cluster.Actor(__version__, job.model_dump_json())


def test_a_node_with_the_same_versions_judges() -> None:
    made = actor()
    [(position, judged)] = made.judge([(7, make_trace())])
    assert position == 7 and judged.kept
    assert made._judge is not None
    made._judge.__exit__(None, None, None)


def test_a_node_with_another_distill_is_refused_before_the_recipe_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = actor()
    made.job = b"as another version wrote it"
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    with pytest.raises(UserError, match=f"node .* distill is 0.0.1 and not {re.escape(__version__)}; install the same"):
        made.ready()


def test_a_node_with_another_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = actor()
    monkeypatch.setattr("distill.grading.identity.installed", lambda package: "9.9" if package == "sympy" else None)
    with pytest.raises(
        UserError, match=rf"other versions .*: math\.sympy is 9\.9 and not {re.escape(version('sympy'))}"
    ):
        made.judge([(0, make_trace())])
