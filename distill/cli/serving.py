"""`distill serve`: the local engine behind an OpenAI-compatible address."""

import os
from typing import Annotated

import typer

from distill.errors import UserError


def serve(
    model: Annotated[
        str, typer.Argument(metavar="TEACHER|STUDENT|DIR", help="a name from a catalog, a model directory, or a hub id")
    ],
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="interface to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port; 0 takes a free one")] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="NAME", help="environment variable with the key that requests must carry"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="what clients call the model; default: its own name")
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="samples decoded at once")] = 128,
    queue: Annotated[int, typer.Option("--queue", min=1, help="requests that may wait; more get status 503")] = 4096,
    per_client: Annotated[
        int, typer.Option("--per-client", min=1, help="requests of one client (address) at once; more get status 429")
    ] = 1024,
    request_bytes: Annotated[
        int, typer.Option("--request-bytes", min=1024, help="size of a request's body; more gets status 413")
    ] = 16 << 20,
    grace: Annotated[
        float,
        typer.Option("--grace", min=0, metavar="SECONDS", help="time that running requests get to finish at the end"),
    ] = 30.0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key of `engine:`, e.g. dtype=float32; repeatable"),
    ] = None,
) -> None:
    """Serve a teacher, a student or any model directory with the local engine, by the OpenAI protocol.

    Examples: `distill serve tiny-r1` · `distill serve runs/tiny/student --port 8001`
    """
    from distill.config import parse
    from distill.recipe import LocalEngine
    from distill.recipe.server import variable_name
    from distill.serve import Address, Limits, model_of, serve

    overrides = [item.removeprefix("engine.") for item in set_ or ()]
    engine = parse(LocalEngine, {}, "--set", overrides)
    if api_key_env is not None:
        try:
            variable_name(api_key_env)
        except ValueError as error:
            raise UserError(f"--api-key-env: {error}") from None
    key = os.environ.get(api_key_env) if api_key_env is not None else None
    if api_key_env is not None and not key:
        raise UserError(f"--api-key-env: the environment variable {api_key_env} is not set; export it with the key")
    found = model_of(model)
    serve(
        found,
        name or found.name,
        engine,
        max_batch,
        Address(host, port, key, grace),
        Limits(request_bytes, queue, per_client),
    )
