"""What is known of GPUs and of torch without importing it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from labkit.experiment import machine
from labkit.experiment.machine import Gpu, Machine

SMI = """#!/bin/sh
case "$1" in
*compute_cap*) {capabilities} ;;
*) echo "0, GPU-a, NVIDIA H100, 81559, 4"; echo "1, GPU-b, NVIDIA A100, 81559, 4" ;;
esac
"""


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str) -> tuple[Gpu, ...]:
    """The GPUs that a driver with these answers has."""
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(capabilities=capabilities))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine._gpus()[0]


def test_capabilities_go_to_their_gpus_and_the_least_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = smi(tmp_path, monkeypatch, 'echo "GPU-b, 8.0"; echo "GPU-a, 9.0"')
    assert [gpu.capability for gpu in gpus] == [(9, 0), (8, 0)]
    here = Machine(cores=2, cores_total=2, memory_bytes=1, gpus=gpus)
    assert here.capability == (8, 0)
    assert replace(here, gpus=()).capability is None


def test_a_gpu_that_torch_cannot_use_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "exit 2")
    for built_for, count in (("", 0), ("13.0", 2)):
        monkeypatch.setattr(machine, "_torch_cuda", lambda built_for=built_for: built_for)
        here = machine._probe.__wrapped__()
        assert len(here.gpus) == count
        assert here.device("auto") == ("cuda" if count else "cpu")
        assert ("build for CPUs" in here.gpu_reason) == (not count)


def test_a_comma_in_the_name_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "exit 2")
    program = tmp_path / "nvidia-smi"
    program.write_text(program.read_text().replace("NVIDIA H100", "NVIDIA H100, 80 GB"))
    first, second = machine._gpus()[0]
    assert (first.name, second.name) == ("NVIDIA H100, 80 GB", "NVIDIA A100")
    assert first.memory_bytes == 81559 * 2**20


@pytest.mark.parametrize("capabilities", ["exit 2", "echo nonsense", 'echo "GPU-a, [N/A]"'])
def test_a_driver_that_does_not_know_them_hides_no_gpu(
    capabilities: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = smi(tmp_path, monkeypatch, capabilities)
    assert [gpu.capability for gpu in gpus] == [None, None]
    assert Machine(cores=2, cores_total=2, memory_bytes=1, gpus=gpus).capability is None


@pytest.mark.parametrize(
    ("said", "found"),
    [("cuda: Optional[str] = '12.8'", "12.8"), ('cuda = "12.6"', "12.6"), ("cuda: Optional[str] = None", ""), ("", "")],
)
def test_the_build_of_torch_is_read_without_importing_it(
    said: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError")
    (tmp_path / "torch/version.py").write_text(f"debug = False\n{said}\nhip: Optional[str] = '6.0'\n")
    monkeypatch.setattr(
        machine, "find_spec", lambda name: importlib.util.spec_from_file_location(name, tmp_path / "torch/__init__.py")
    )
    assert machine._torch_cuda() == found
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert machine._torch_cuda() == ""
    assert "torch" not in sys.modules or sys.modules["torch"].__file__ != str(tmp_path / "torch/__init__.py")
