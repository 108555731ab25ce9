"""What all tests share: no network, one torch thread a process, the same examples in every run, and the real data.

Set before torch or transformers can be imported, hence at the top of this file and in the environment, which the
processes that tests start inherit.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DISTILL_TEST_DATA", ROOT.parent / "shared" / "data"))
CASES = DATA.parent / "cases"

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("MPLBACKEND", "Agg")):
    os.environ.setdefault(name, value)
GPU = Path("/dev/nvidia0").exists()
if not GPU:  # GPU kernels then run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A failure must be the change's fault, not the draw's or a busy machine's.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but every nth case of a test with `one_in(n)` slow: n prime to the numbers of its parameters' values
    leaves some of each."""
    seen: Counter[object] = Counter()
    for item in items:
        if mark := item.get_closest_marker("one_in"):
            test = (item.path, getattr(item, "originalname", item.name))
            if seen[test] % mark.args[0]:
                item.add_marker("slow")
            seen[test] += 1


@pytest.fixture(autouse=True, scope="module")
def hidden_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only tests in test_gpu_*.py use a GPU: the others test what holds on a CPU, such as the same bits in any batch.
    Processes that they start have no GPU either."""
    with pytest.MonkeyPatch.context() as patch:
        if GPU and not request.path.name.startswith("test_gpu_"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr("torch.cuda.is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("gsm8k/test.jsonl")` → its path. Skips without the data; with it, a missing file is an error."""

    def find(name: str) -> Path:
        if not DATA.is_dir():
            pytest.skip(f"real data: no directory {DATA} (set DISTILL_TEST_DATA)")
        path = DATA / name
        assert path.exists(), f"{path} does not exist, although {DATA} does: is the name right?"
        return path

    return find


@pytest.fixture(scope="session")
def cases() -> Callable[[str], Path]:
    """`cases("prompts/nan.jsonl")` → the path of a case that once failed. Skips and errs as `real_data` does."""

    def find(name: str) -> Path:
        if not CASES.is_dir():
            pytest.skip(f"real data: no directory {CASES} (set DISTILL_TEST_DATA)")
        path = CASES / name
        assert path.exists(), f"{path} does not exist, although {CASES} does: is the name right?"
        return path

    return find
