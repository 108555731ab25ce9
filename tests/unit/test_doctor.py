"""What a machine has, read from files made for the purpose, and the speed to expect, worked out by hand."""

import pytest
import torch

from distill import doctor, hardware
from distill.doctor import REACHED, Limits, tokens_per_second
from distill.engine.kernels import cpu
from distill.errors import UserError

GIB = 1 << 30


def test_a_dense_model_is_read_once_a_step():
    """10 GB at 100 GB/s: 10 steps a second at best, whatever the batch, until the products take longer."""
    limits = Limits(bandwidth=100e9, products=2e12, disk=1e9, memory=20e9)
    assert tokens_per_second(10e9, 5e9, 5e9, 1, limits) == pytest.approx(10 * REACHED)
    assert tokens_per_second(10e9, 5e9, 5e9, 8, limits) == pytest.approx(80 * REACHED)
    assert tokens_per_second(10e9, 5e9, 5e9, 64, limits) == pytest.approx(2e12 / 10e9 * REACHED)  # 10 GFLOP a token


def test_a_mixture_reads_what_its_sequences_need():
    """A tenth is active: one sequence reads 1 GB of 10, two read 1.9."""
    limits = Limits(bandwidth=100e9, products=1e18, disk=1e9, memory=20e9)
    assert tokens_per_second(10e9, 10e9, 1e9, 1, limits) == pytest.approx(100 * REACHED)
    assert tokens_per_second(10e9, 10e9, 1e9, 2, limits) == pytest.approx(2 / 0.019 * REACHED)


def test_what_does_not_fit_comes_from_the_disk():
    """Half of what a sequence needs, 0.5 GB, at 1 GB/s: two tokens a second."""
    limits = Limits(bandwidth=100e9, products=1e18, disk=1e9, memory=5e9)
    assert tokens_per_second(10e9, 10e9, 1e9, 1, limits) == pytest.approx(2)


@pytest.fixture
def cgroup(tmp_path):
    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text + "\n")
        return tmp_path

    return write


def test_cores_under_a_quota(cgroup, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert hardware.cores(cgroup(cpu_max="max 100000")) == 12
    assert hardware.cores(cgroup(cpu_max="250000 100000")) == 2
    assert hardware.cores(cgroup(cpu_max="50000 100000")) == 1
    assert hardware.cores(cgroup(cpu_max="9900000 100000")) == 12
    assert hardware.cores(cgroup(cpu_max="") / "nothing here") == 12


def test_a_machine_in_one_line(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: NVIDIA H100 (UUID: x)\\n  MIG 1g\\nGPU 1: NVIDIA H100 (UUID: y)\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(hardware, "processor", lambda: "Some CPU")
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert hardware.description() == "Some CPU, 8 cores, 2 × NVIDIA H100"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert hardware.description() == "Some CPU, 2 of 8 cores, 1 × NVIDIA H100"
    smi.unlink()
    monkeypatch.setattr(hardware, "cores", lambda: 1)
    assert hardware.description() == "Some CPU, 1 core"


def test_memory_under_a_limit(cgroup, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  67108864 kB\nMemFree:  1 kB\nMemAvailable:  33554432 kB\n")
    assert hardware.memory(tmp_path / "none", meminfo) == (64 * GIB, 32 * GIB)
    assert hardware.memory(cgroup(memory_max="max", memory_current="5"), meminfo) == (64 * GIB, 32 * GIB)
    limited = cgroup(memory_max=str(8 * GIB), memory_current=str(3 * GIB))
    assert hardware.memory(limited, meminfo) == (8 * GIB, 5 * GIB)


def test_the_processor_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: another\n")
    assert hardware.processor(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert hardware.processor(tmp_path / "none")


def test_measurements_are_positive_and_small_ones_are_quick(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert hardware.memory_bandwidth(1 << 16) > 0
    assert hardware.product_rate(4, 8) > 0
    assert hardware.disk_rate(tmp_path / "file") > 0


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda device: 40e9)
    monkeypatch.setattr(doctor, "product_rate", lambda device: 4000e9)
    monkeypatch.setattr(doctor, "kernel_rate", lambda: 400e9)
    machine = hardware.Machine("Some CPU", 2, 24 * GIB, 20 * GIB, int(1e12), ())
    monkeypatch.setattr(doctor, "this_machine", lambda: machine)


def test_every_teacher_of_the_catalog_has_a_line(quick, capsys):
    doctor.doctor()
    out = capsys.readouterr().out
    for name in doctor.catalog.entries("teacher"):
        assert name[:20] in out
    assert f"{torch.get_num_threads()}" in out and "40.0 GB/s" in out and "4,000 GFLOP/s by torch" in out
    assert "assumed" in out, "671 GB do not fit into 20 GiB"
    line = next(line for line in out.splitlines() if "deepseek-llm-67b" in line)
    assert "too large for" in line and "–" in line, "a dense model cannot be streamed"
    line = next(line for line in out.splitlines() if line.startswith("kimi-k3"))
    assert line.split() == ["kimi-k3", "–", "–", "–", "–", "behind", "a", "server", "only"]


def test_a_forecast_is_made_with_the_rate_of_the_engines_kernels(quick, capsys, monkeypatch):
    """2 GFLOP a token and parameter: a 7B model at 64 sequences is bound by 400 GFLOP/s of the kernels; torch's rate
    would promise ten times as much."""
    machine = hardware.Machine("AMX", 2, 64 * GIB, 60 * GIB, int(1e12), ())
    card = doctor.catalog.load_teacher("deepseek-llm-7b-chat")
    row = doctor._row(card, None, doctor._limits(machine, None), machine)
    assert row[-2] == f"{400 / (2 * card.parameters) * REACHED:.0f}"
    out = " ".join(capsys.readouterr().out.split())
    assert "multiply at 400 GFLOP/s, which the forecast is made with" in out


def test_the_kernels_rate_is_measured_with_the_kernels(monkeypatch):
    calls = []
    real = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *arguments: calls.append(1) or real(*arguments))
    assert doctor.kernel_rate(4, 128) > 0
    assert len(calls) == (0 if cpu.why_missing() else 3)


def test_one_teacher_and_an_unknown_one(quick, capsys):
    doctor.doctor("deepseek-r1")
    out = capsys.readouterr().out
    assert "deepseek-r1 " in out and "deepseek-v3" not in out and "on disk" in out
    with pytest.raises(UserError, match=r"no teacher is named 'deepsek-r1'.*deepseek-r1"):
        doctor.doctor("deepsek-r1")


def test_missing_kernels_are_said(quick, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "why_missing", lambda: "they were not compiled; install a C++20 compiler")
    doctor.doctor("tiny-r1")
    out = " ".join(capsys.readouterr().out.split())
    assert "install a C++20 compiler" in out and "reference kernels" in out


def test_the_instruction_set_in_use_stays():
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    before = cpu.instruction_set()
    assert before in cpu.instruction_sets() and cpu.instruction_sets()[-1] == "portable"
    assert cpu.instruction_set() == before
