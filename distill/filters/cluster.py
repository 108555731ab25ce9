"""Judging each trace by itself on a Ray cluster: the same `Judge` in an actor on every processor.

This process reads the traces and sends them in batches, so the nodes need neither the run directory nor a shared file
system; what the settings name (a student's tokenizer, files of benchmarks) they find under the same path. Verdicts come
back, go to the ledger and are arranged as those of one process are. Judging is a function of a trace, the settings and
the seed, so it does not matter where a batch was judged, or how often: a worker that is killed is restarted by Ray, and
its batches are judged again.

The ledger records one identity for all verdicts. So before it judges, each actor compares the versions of distill, the
filters, the graders and their packages, and the level of isolation, with those of this process, and a node with others
is refused. The recipe travels as JSON and is read after the version of distill was compared: another version may not be
able to read it.

Rejected: Ray Data (its operators choose block sizes and order by themselves; what is wanted here is a bounded number of
batches on their way) and tasks instead of actors (each would start its own grading process).
"""

import os
import platform
import re
import socket
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from distill import __version__
from distill.artefacts import Artefact, Settings
from distill.errors import UserError, WorkError
from distill.filters.judge import Judge
from distill.filters.judged import Judged
from distill.filters.resources import RunResources, judges_identity
from distill.recipe import Recipe
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

Batch = list[tuple[int, Trace]]
Results = list[tuple[int, Judged]]

BATCH = 64  # traces; some 4 MB
WAITING = 2  # batches at an actor, so that it does not idle while the next one travels
ATTEMPTS = 4  # of a batch, before it is taken for what kills the workers
MAX_PORT, CONNECT_SECONDS = 65535, 5.0
START_SECONDS = 300.0  # until a cluster has a free processor


class Job(Artefact):
    """What an actor needs to judge. directory: where the command runs, for relative paths. tasks: those of the traces.
    identity: the versions that decide verdicts (`judges_identity`)."""

    recipe: Recipe
    directory: str
    tasks: tuple[str, ...]
    identity: Settings


class Actor:
    """Judges batches in a process of the cluster.

    version: that of distill on the machine of the command. job: a `Job` as JSON.
    """

    def __init__(self, version: str, job: str) -> None:
        self.version, self.job = version, job
        self._judge: Judge | None = None

    def ready(self) -> None:
        """Load what judging needs. Errors: UserError, such as for other versions than the command has; WorkError."""
        if self._judge is None:
            require_same_versions({"distill": self.version}, {"distill": __version__})
            job = Job.model_validate_json(self.job)
            require_same_versions(job.identity, judges_identity(job.recipe, job.tasks))
            if os.path.isdir(job.directory):
                os.chdir(job.directory)
            settings = job.recipe.filter
            filters = [  # each processor has its actor
                each.model_copy(update={"workers": 1}) if "workers" in type(each).model_fields else each
                for each in settings.judging_filters()
            ]
            resources = RunResources(job.recipe, tasks=job.tasks)
            self._judge = Judge(filters, settings.choosing_filters(), resources).__enter__()

    def judge(self, batch: Batch) -> Results:
        """The batch's traces, judged, in any order. Errors: as `ready`."""
        self.ready()
        assert self._judge is not None
        return list(self._judge.judge(batch))


def require_same_versions(wanted: Settings, here: Settings) -> None:
    """Raise UserError that names this node and each version that differs. wanted: those of the command."""
    names = [name for name in {**wanted, **here} if wanted.get(name) != here.get(name)]
    if names:
        differences = ", ".join(f"{name} is {here.get(name)} and not {wanted.get(name)}" for name in names)
        raise UserError(
            f"--on ray: node {platform.node()} has other versions than the machine of the command: {differences}; "
            f"install the same ones on every node"
        )


def require_ray() -> None:
    """Raise UserError where Ray is not installed, or RAY_ADDRESS names nothing that answers. Cheap, unlike Ray itself,
    which tries for minutes."""
    if find_spec("ray") is None:
        raise UserError("--on ray: Ray is not installed; pip install 'distill[ray]', on every node")
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not re.fullmatch(r"\d{1,5}", port) or int(port) > MAX_PORT:
        raise UserError(
            f"--on ray: RAY_ADDRESS is {address!r}; set it to HOST:PORT of the cluster's head node, such as "
            f"10.0.0.1:6379, which `ray start --head` prints"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--on ray: no cluster answers at {address} ({error}); start one there with "
            f"`ray start --head --port {port}`, or correct or unset RAY_ADDRESS"
        ) from error


class ClusterJudge:
    """As `Judge`, on the cluster that RAY_ADDRESS names, else on one that runs on this machine, else on a new one.

    A context manager: it connects, unless this process is connected already, and starts an actor for each processor.
    tasks: those of the traces.
    """

    def __init__(self, recipe: Recipe, tasks: Collection[str]) -> None:
        self.recipe, self.tasks = recipe, tasks

    def __enter__(self) -> "ClusterJudge":
        import ray

        self._connected = not ray.is_initialized()
        if self._connected:
            try:
                ray.init(log_to_driver=False, logging_level="ERROR")
            except ConnectionError as error:
                raise UserError(
                    f"--on ray: no Ray cluster answers at {os.environ.get('RAY_ADDRESS')}; start one there with "
                    f"`ray start --head`, or correct or unset RAY_ADDRESS"
                ) from error
        identity = judges_identity(self.recipe, self.tasks)
        job = Job(recipe=self.recipe, directory=os.getcwd(), tasks=tuple(self.tasks), identity=identity)
        number = max(1, int(ray.cluster_resources().get("CPU", 1)))
        remote = ray.remote(Actor).options(num_cpus=1, max_restarts=-1, max_task_retries=ATTEMPTS - 1)
        self._actors: list[ActorHandle] = [remote.remote(__version__, job.model_dump_json()) for _ in range(number)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        if self._connected:
            ray.shutdown()

    def judge(self, traces: Iterable[tuple[int, Trace]]) -> Iterator[tuple[int, Judged]]:
        """Yield (position, judged trace) for every (position, trace), in order of completion. Lazy in `traces`.

        Errors: UserError and WorkError of the filters; WorkError when no worker starts, or one batch kills several.
        """
        import ray

        source = iter(traces)
        starting: dict[ObjectRef, ActorHandle] = {actor.ready.remote(): actor for actor in self._actors}
        working: dict[ObjectRef, ActorHandle] = {}
        free: deque[ActorHandle] = deque()
        more = True
        while more or working:
            while free and more:
                batch = list(islice(source, BATCH))
                more = bool(batch)
                if batch:
                    actor = free.popleft()
                    working[actor.judge.remote(batch)] = actor
            if not (working or more):
                return
            done, _ = ray.wait([*starting, *working], timeout=None if working else START_SECONDS)
            if not done:
                raise WorkError(f"no processor of the Ray cluster was free for {START_SECONDS:.0f} s; see `ray status`")
            for ref in done:
                results = _result(ref)
                if ref in starting:
                    free.extend([starting.pop(ref)] * WAITING)
                else:
                    free.append(working.pop(ref))
                    yield from results


def _result(ref: "ObjectRef") -> Results:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(ref) or []
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, WorkError)):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise WorkError(
            f"a batch of traces killed its Ray worker {ATTEMPTS} times, the node may lack memory; verdicts so far are "
            f"kept, and the same command goes on"
        ) from error
