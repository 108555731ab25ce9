"""`distill serve`: a model of this machine behind an OpenAI-compatible address.

The same engine, template and random draws as `distill generate` and `distill eval`: for the same seed, prompt key and
sample number an answer is the same text, token for token, whether it comes from here or from them. What a request says
is read in `requests`, whose turn it is in `admission`, tokens become choices in `choices` and answers in `answers`;
`app` has the addresses.

Loopback by default. Another interface needs a key, because anyone who reaches the address can use the machine.
"""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address

import uvicorn

from distill import catalog, interrupts, model_files
from distill.backends.live import LiveModel
from distill.config import did_you_mean
from distill.console import say
from distill.errors import UserError, WorkError
from distill.models import Model, teacher_of
from distill.recipe import LocalEngine
from distill.serve.answers import Answers
from distill.serve.app import Limits, Service

__all__ = ["Address", "Limits", "model_of", "serve"]

LONGEST_GRACE = 1e9  # seconds, for a server that waits without end


@dataclass(frozen=True)
class Address:
    """Where a server listens. port: 0 takes a free one. key: that requests must carry; None: loopback only. grace:
    seconds that running requests get to finish when the server is stopped."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    grace: float = 30.0

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def model_of(name_or_path: str) -> Model:
    """The model that `distill serve` is given: a teacher, a student (before training), or a model directory.

    Errors: UserError when there is none, or its weights are not on this machine.
    """
    if "/" not in name_or_path:
        if name_or_path in catalog.entries("teacher"):
            model = teacher_of(name_or_path, name_or_path)
            if model.is_remote:
                raise UserError(f"teacher {name_or_path} is behind a server already; name a model of this machine")
            return model
        if name_or_path in catalog.entries("student"):
            template = catalog.load_student(name_or_path).chat_template
            return Model(name_or_path, catalog.resolve_weights("student", name_or_path), template=template)
    try:
        directory = model_files.model_directory(name_or_path)
    except UserError as error:
        hint = did_you_mean(name_or_path, [*catalog.entries("teacher"), *catalog.entries("student")])
        raise UserError(f"{error}; or name a teacher or a student of the catalog{hint}") from error
    return Model(directory.name, directory)


def serve(
    model: Model,
    name: str,
    engine: LocalEngine,
    max_batch: int,
    address: Address,
    limits: Limits = Limits(),  # noqa: B008
) -> None:
    """Load a model and answer requests until SIGINT or SIGTERM. name: what clients call the model.

    Errors: UserError when the address cannot be used, or the model cannot be loaded; WorkError when the engine dies.
    """
    if not address.is_loopback and address.key is None:
        raise UserError(
            f"--host {address.host} lets other machines use this one; set a key in an environment variable and name it "
            f"with --api-key-env, or leave --host out"
        )
    with _listening(address) as listener, interrupts.held():
        say(f"loading {model.directory}")
        live = LiveModel.load(model, engine, max_batch)
        try:
            asyncio.run(_serve(live, name, address, limits, listener))
        finally:
            live.close()


async def _serve(live: LiveModel, name: str, address: Address, limits: Limits, listener: socket.socket) -> None:
    live.start()
    service = Service(Answers(live, name), address.key, limits, address.is_loopback)
    server = _Server(
        uvicorn.Config(
            service.app(),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(min(address.grace, LONGEST_GRACE)) + 5,
        )
    )
    ending = asyncio.Event()

    def end() -> None:
        if ending.is_set():  # a second time: do not wait
            live.drop_all()
            server.force_exit = True
        ending.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {name} at http://{shown}:{port}/v1 (Ctrl-C ends it)")
    serving = asyncio.ensure_future(server.serve([listener]))
    watching = [asyncio.ensure_future(event.wait()) for event in (ending, live.broken)]
    await asyncio.wait((serving, *watching), return_when=asyncio.FIRST_COMPLETED)
    service.draining = server.should_exit = True
    if service.admission.running and not live.broken.is_set():
        say(f"ending: {service.admission.running:,} samples get {address.grace:g} s to finish")
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), address.grace)
        live.drop_all()
    await serving
    for task in watching:
        task.cancel()
    if live.broken.is_set():
        raise WorkError(f"{live.why}; start the server again")


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing."""
        yield


@contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    """A socket at the address, taken before the model is loaded. Errors: UserError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such port"
            raise UserError(
                f"cannot listen on {address.host}, port {address.port}: {reason}; choose another --host or --port"
            ) from error
        listener.listen(2048)
        yield listener
    finally:
        listener.close()
