"""Messages between a process and its renderer: 8 bytes of length, then that many bytes of JSON."""

import json
import struct
from typing import IO

LENGTH = struct.Struct(">Q")


def send(stream: IO[bytes], message: dict[str, object]) -> None:
    """Write one frame. Lone surrogates pass, as they may stand in other people's texts."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, object] | None:
    """Read one frame; None where the stream ends."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    data = stream.read(LENGTH.unpack(head)[0])
    message: dict[str, object] = json.loads(data.decode("utf-8", "surrogatepass"))
    return message
