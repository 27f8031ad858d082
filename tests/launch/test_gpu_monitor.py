"""The monitor of the GPUs with a library that pretends to be NVML: what it records, and how it fails."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment.event_file import EventFile
from labkit.experiment.gpu_events import GPU_EVENTS
from labkit.experiment.machine import Gpu
from labkit.experiment.run_directory import RunDirectory
from labkit.launch import gpu_monitor, nvml
from labkit.launch.gpu_monitor import GpuMonitor, others
from labkit.launch.gpu_window import Window
from labkit.launch.nvml import Reading
from labkit.runs.checked import checked_fields
from labkit.runs.gpus import GpuFile, GpuHistory
from tests.launch.helpers import changed_ranks, start, tiny

FAKE = Path(__file__).parent / "fake_nvml"
GIB = 2**30
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "total": 80 * GIB,
    "used": [1 * GIB, 1 * GIB, 60 * GIB, 40 * GIB],
    "utilisation": [0, 100, 50],
    "limit_milliwatts": 700_000,
    "milliwatts": 400_000,
    "millijoules": [1_000_000, 1_400_000, 1_800_000, 2_200_000],
    "temperature": [40, 70, 60],
    "clock": 1500,
    "max_clock": 1980,
    "reasons": [0, 4, 0],
    "generation": 5,
    "max_generation": 5,
    "width": 8,
    "max_width": 16,
    "processes": {"children": GIB, "1": 2 * GIB},
}


@pytest.fixture
def nvml_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets what the pretended NVML reports."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    importlib.invalidate_caches()

    def set_scenario(**scenario: Any) -> None:
        (tmp_path / "nvml.json").write_text(json.dumps(scenario))
        monkeypatch.setenv("FAKE_NVML", str(tmp_path / "nvml.json"))

    monkeypatch.setattr(gpu_monitor, "INTERVAL_S", 0.02)
    monkeypatch.setattr(gpu_monitor, "MAX_SHARE", 10)
    yield set_scenario
    sys.modules.pop("pynvml", None)


def gpu(index: int, uuid: str | None = None) -> Gpu:
    return Gpu(index, uuid or f"GPU-{index}", "H100", 80 * GIB, 0)


def observed(tmp_path: Path, *gpus: Gpu, seconds: float = 0.5) -> GpuFile:
    """What the monitor writes about these GPUs in so many seconds, as it is read."""
    directory = RunDirectory(tmp_path)
    monitor = GpuMonitor(EventFile(directory.gpus), gpus)
    monitor.start()
    time.sleep(seconds)
    monitor.stop()
    file = GpuFile(directory)
    assert file.read()
    assert not file.skipped_lines
    return file


@pytest.mark.parametrize("count", [1, 2, 8])
def test_every_gpu_has_its_own_figures(count: int, tmp_path: Path, nvml_with: Any) -> None:
    nvml_with(gpus={f"GPU-{index}": H100 | {"temperature": 40 + index} for index in range(count)})
    file = observed(tmp_path, *(gpu(index) for index in range(count)))
    assert len(file.gpus) == count
    for index, history in enumerate(file.gpus):
        assert history.facts["index"] == index
        assert history.facts["power_limit_watts"] == 700
        assert (history.facts["sm_clock_mhz"], history.facts["pcie_width"]) == (1980, 16)
        assert history["temperature_celsius"].max() == 40 + index
        assert history["utilisation"][:2].tolist() == [100, 50]
        assert history["memory_bytes"].max() == 60 * GIB
        assert history["power_watts"].tolist() == pytest.approx([400] * history.records)
        assert history["energy_joules"].sum() == pytest.approx(1200), "by the counter, not by power and time"
        assert 0 < history["power"].sum() < history["seconds"].sum(), "one reading of all said that it was throttled"
        assert history["power_brake"].sum() == 0


def test_what_a_gpu_does_not_report_is_left_out(tmp_path: Path, nvml_with: Any) -> None:
    few = {name: H100[name] for name in ("used", "total", "temperature")}
    nvml_with(gpus={"GPU-0": few | {"milliwatts": 100_000, "old_reasons": 0x48}})
    (history,) = observed(tmp_path, gpu(0)).gpus
    assert history.facts["name"] == "H100"
    assert "power_limit_watts" not in history.facts
    assert not history["utilisation"][history["utilisation"] == history["utilisation"]].size
    assert history["energy_joules"].sum() == pytest.approx(100 * history["seconds"].sum(), rel=0.05), (
        "without a counter"
    )
    assert history["thermal"].sum() == pytest.approx(history["seconds"].sum()), "drivers before 535"
    assert history["hardware"].sum() == 0, "the bit accompanies the thermal one"


def test_a_slice_has_its_memory_and_the_rest_of_its_gpu(tmp_path: Path, nvml_with: Any) -> None:
    slice_of = {"name": "MIG 1g.10gb", "used": 5 * GIB, "total": 10 * GIB, "parent": "GPU-7", "processes": {}}
    nvml_with(gpus={"MIG-a": slice_of, "MIG-b": slice_of, "GPU-7": H100})
    first, second = observed(tmp_path, gpu(0, "MIG-a"), gpu(1, "MIG-b")).gpus
    assert (first.title, second.title) == ("MIG slice 0", "MIG slice 1")
    assert first.facts["memory_bytes"] == 10 * GIB
    assert first["memory_bytes"].max() == 5 * GIB
    assert first["power_watts"].max() == 400
    assert first["utilisation"].size
    assert not (first["utilisation"] >= 0).any(), "NVML has none of a slice"


def test_a_gpu_that_is_lost_ends_its_figures_and_no_others(tmp_path: Path, nvml_with: Any) -> None:
    nvml_with(gpus={"GPU-0": H100 | {"fails_after": 3}, "GPU-1": H100})
    first, second = observed(tmp_path, gpu(0), gpu(1)).gpus
    assert "lost" in first.reason
    assert first.records < second.records
    assert not second.reason


def test_without_nvml_one_sentence_says_why(
    tmp_path: Path, nvml_with: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml_with(no_driver=True)
    file = observed(tmp_path, gpu(0), seconds=0.1)
    assert file.reason == "no figures of the GPUs: NVML cannot be used: Driver Not Loaded"
    assert file.gpus == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (tmp_path / "second").mkdir()
    file = observed(tmp_path / "second", gpu(0), seconds=0.1)
    assert "pip install 'labkit[gpu]'" in file.reason
    assert capsys.readouterr().err.count("labkit[gpu]") == 1
    nvml_with(gpus={"GPU-1": H100})
    monkeypatch.delitem(sys.modules, "pynvml")
    (tmp_path / "third").mkdir()
    unknown, known = observed(tmp_path / "third", gpu(0), gpu(1)).gpus
    assert "does not know H100 GPU-0: Not Found" in unknown.reason
    assert known.records


def test_a_library_that_hangs_delays_the_end_by_a_moment_only(
    tmp_path: Path, nvml_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml_with(gpus={"GPU-0": H100}, hangs_s=0.4)
    monkeypatch.setattr(gpu_monitor, "END_S", 0.2)
    begun = time.monotonic()
    observed(tmp_path, gpu(0), seconds=0.1)
    assert time.monotonic() - begun < 0.9, "one reading takes 4 s"


def test_signals_are_left_to_the_main_thread(tmp_path: Path, nvml_with: Any) -> None:
    """SIGTERM would end the supervisor if another thread took it."""
    nvml_with(gpus={"GPU-0": H100})
    monitor = GpuMonitor(EventFile(tmp_path / "gpus.jsonl"), [gpu(0)])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monitor.start()
    task = Path(f"/proc/self/task/{monitor._thread.native_id}/status").read_text()
    (mask,) = [int(line.split()[1], 16) for line in task.splitlines() if line.startswith("SigBlk:")]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    monitor.stop()
    assert all(mask >> number - 1 & 1 for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGINT))


def test_an_expensive_driver_is_asked_less_often(
    tmp_path: Path, nvml_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml_with(gpus={"GPU-0": H100})
    read = nvml.NvmlGpu.read

    def expensive(self: nvml.NvmlGpu) -> Reading:
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass
        return read(self)

    monkeypatch.setattr(nvml.NvmlGpu, "read", expensive)
    monkeypatch.setattr(gpu_monitor, "MAX_SHARE", 0.005)
    (history,) = observed(tmp_path, gpu(0), seconds=1.3).gpus
    assert history.records <= 4, "0.4 s between two readings of 2 ms, instead of 0.02 s"


def test_a_long_run_writes_a_bounded_number_of_records(
    tmp_path: Path, nvml_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml_with(gpus={"GPU-0": H100})
    monkeypatch.setattr(gpu_monitor, "RECORDS_PER_LENGTH", 4)
    (history,) = observed(tmp_path, gpu(0), seconds=1.2).gpus
    assert 8 <= history.records <= 4 * 6
    assert history["seconds"][4:7].mean() > 1.5 * history["seconds"][:4].mean()
    assert history["seconds"].sum() == pytest.approx(1.2, abs=0.15), "no time is missing"


def test_others_are_known_only_beside_a_process_of_the_run() -> None:
    me = os.getpid()
    assert others({me: 10, 1: 20}, me) == (1, 20)
    assert others({me: 10}, me) == (0, 0)
    assert others({1: 20}, me) is None
    assert others({}, me) is None
    assert others({me: 10, 2**22 + 1: 30}, os.getppid()) == (1, 30), "a pid of another namespace is not ours"


def test_a_window_weighs_by_time() -> None:
    window = Window(lambda processes: None)
    for monotonic, percent in ((0.0, 0), (1.0, 100), (4.0, 20)):
        window.add(Reading(monotonic, utilisation=percent, power_watts=100.0, throttling=frozenset()))
    assert window.record() == {
        "seconds": 4.0,
        "utilisation": 40.0,
        "utilisation_max": 100,
        "power_watts": 100.0,
        "energy_joules": 400.0,
        "throttled": {},
    }
    assert window.record() == {"seconds": 0.0}


def test_what_is_written_is_declared() -> None:
    source = Path(gpu_monitor.__file__).read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    written = {
        node.args[0].value
        for node in calls
        if isinstance(node.func, ast.Attribute)
        and node.func.attr == "_write"
        and isinstance(node.args[0], ast.Constant)
    }
    assert written == set(GPU_EVENTS)


def test_a_run_records_its_gpus_and_says_what_slowed_them_down(tmp_path: Path) -> None:
    """A real run on the CPU, whose supervisor is told to watch two pretended GPUs."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "pynvml.py").write_text((FAKE / "pynvml.py").read_text())
    scenario = {"gpus": {"GPU-0": H100 | {"used": 79 * GIB}, "GPU-1": H100}}
    (tmp_path / "nvml.json").write_text(json.dumps(scenario))
    watch = (
        "from labkit.launch import gpu_monitor\n"
        "from labkit.experiment.machine import Gpu\n"
        "gpu_monitor.INTERVAL_S, gpu_monitor.MAX_SHARE = 0.05, 1\n"
        "gpu_monitor.gpus_of = lambda experiment: [Gpu(i, f'GPU-{i}', 'H100', 0, 0) for i in range(2)]\n"
    )
    with changed_ranks(folder), pytest.MonkeyPatch.context() as patched:
        patched.setenv("FAKE_NVML", str(tmp_path / "nvml.json"))
        patched.setenv("LABKIT_TEST_CHANGE", watch)
        from labkit.launch import client

        client.close()
        run = start(tiny(steps=400)).wait(60)
    assert run.state == "finished", run.cause
    other = run.data().gpus[0]["other_bytes"]
    assert set(other[other >= 0]) == {2 * GIB}, "of pid 1, which no supervisor has started"
    summary = json.loads(run.directory.summary.read_text())
    assert [use["ranks"] for use in summary["gpus"]] == [[0], [1]]
    assert summary["gpus"][1]["memory_peak_bytes"] == 60 * GIB
    assert summary["gpus"][1]["energy_joules"] == pytest.approx(1200)
    assert any(note.startswith("GPU 0: 79.0 of 80.0 GiB") for note in summary["notes"])
    assert any(note.startswith("GPU 0, GPU 1: another process holds 2.0 GiB") for note in summary["notes"])
    assert any("8 of 16 lanes" in note for note in summary["notes"])


def test_a_run_on_the_cpu_has_no_monitor() -> None:
    run = start(tiny(ranks=1, steps=5)).wait(60)
    assert not run.directory.gpus.exists()
    assert run.summary()["gpus"] == []


def test_the_reader_believes_nothing() -> None:
    history, declared = GpuHistory(0), GPU_EVENTS["gpu_use"]
    for event in (
        {"seconds": -1},
        {"seconds": 1e300},
        {"seconds": 1.0, "utilisation": 1e9, "throttled": {"power": None, "thermal": 1e9, "x": 3}, "power_watts": "1"},
    ):
        history.add(checked_fields(declared, {"monotonic": 1.0} | event))
    assert history.records == 1
    assert history["power"].tolist() == [0.0]
    assert history["thermal"].tolist() == [1.0]
    assert not history["utilisation"].tolist()[0] >= 0
    assert not history["power_watts"].tolist()[0] >= 0
