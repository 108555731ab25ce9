"""Which kind of device the local engine takes, known without loading anything: it decides the numbers."""

from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of GPUs, on Linux and under WSL


def device_type(asked: str) -> str:
    """ "cpu" or "cuda" for a recipe's `engine.device`. torch is imported only where a GPU's driver is installed."""
    if asked != "auto":
        return asked
    if not any(Path(name).exists() for name in DRIVERS):
        return "cpu"
    from distill.engine.device import choose_device

    return choose_device(None).type
