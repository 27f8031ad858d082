"""What all tests share: a home of their own, honest skips, and proof that no process is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest

from labkit.experiment.machine import Machine
from tests.browser.find_browser import MISSING, find_browser
from tests.tiers import SAMPLES

# Every process that a test starts inherits this mark, whatever it does to its session, its parent or its name.
MARK = "LABKIT_TEST_SESSION"
SETTLE_S = 15.0
BUSY = {"gradients", "parallel", "quantization", "sparsity", "training"}
"""Folders whose tests train on several ranks and so keep all cores busy: two at once take longer than one by one."""
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_configure(config: pytest.Config) -> None:
    # Before collection, and for the whole session: no test may see or touch the runs of the person who tests.
    given = os.environ.get("LABKIT_TEST_HOME")
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # side by side, each with a home of its own
    if given and worker:
        given = str(Path(given) / worker)
    config.labkit_home = given or tempfile.mkdtemp(prefix="labkit-test-")  # type: ignore[attr-defined]
    config.labkit_home_is_ours = given is None  # type: ignore[attr-defined]
    config.option.markexpr = config.option.markexpr or "not exhaustive"
    os.environ["LABKIT_HOME"] = config.labkit_home  # type: ignore[attr-defined]
    os.environ[MARK] = uuid.uuid4().hex
    os.environ.pop("LABKIT_UI", None)
    # Under nohup, or in the background of a script, these are ignored, and so they would be in all that tests start. A
    # handler keeps this session as it is, and what it starts begins with the usual disposition.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    if config.option.markexpr != "gpu":  # what these tests claim, they claim of CPUs, on a GPU server too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure(config: pytest.Config) -> None:
    if getattr(config, "labkit_home_is_ours", False):
        shutil.rmtree(config.labkit_home, ignore_errors=True)  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = "" if Machine.here().gpus else Machine.here().gpu_reason or "no GPU is visible"
    no_browser = "" if find_browser() else MISSING
    cases: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        sample = SAMPLES.get(getattr(item, "originalname", ""))
        if sample is not None and (tier := sample.tier(cases[test])) > 1:
            item.add_marker(pytest.mark.slow if tier == 2 else pytest.mark.exhaustive)
        cases[test] += 1
        if item.path.parent.name in BUSY:
            item.add_marker(pytest.mark.alone)
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {no_gpu}"))
        if no_browser and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=no_browser))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """End what a failed test has started and not ended: it would take the cores from all tests that follow."""
    begun = time.time()
    try:
        yield
    except BaseException:
        for process, command in _marked():
            with contextlib.suppress(psutil.Error):
                if process.create_time() >= begun - 1 and not _is_own_standby(process, command):
                    process.kill()
        raise


@pytest.fixture
def labkit_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LABKIT_HOME for one test alone, not made yet."""
    home = tmp_path / "home"
    monkeypatch.setenv("LABKIT_HOME", str(home))
    return home


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the session when a rank, a supervisor, a standby or anything else that a test started is still there."""
    yield
    deadline = time.monotonic() + SETTLE_S
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    described = [f"{process.pid}: {' '.join(command)[:200]}" for process, command in left]
    # Ended here all the same, so that one leak does not disturb whoever comes next. By pid, and only our own.
    for process, _ in left + _own_standbys():
        try:
            process.kill()
            process.wait(5)
        except psutil.Error:
            pass
    assert not described, f"processes left behind by tests: {described}"


def _marked() -> list[tuple[psutil.Process, list[str]]]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]:
                found.append((process, process.cmdline()))
        except psutil.Error:
            continue  # gone, a zombie, or somebody else's
    return found


def _is_own_standby(process: psutil.Process, command: list[str]) -> bool:
    # This process is a kernel to labkit, and its standby lives as long as it does. A supervisor and its ranks, forked
    # from the standby, show the same command line but have another parent.
    try:
        return "labkit.launch.standby" in command and process.ppid() == os.getpid()
    except psutil.Error:
        return False


def _own_standbys() -> list[tuple[psutil.Process, list[str]]]:
    return [(process, command) for process, command in _marked() if _is_own_standby(process, command)]


def _left_behind() -> list[tuple[psutil.Process, list[str]]]:
    return [
        (process, command)
        for process, command in _marked()
        if not _is_own_standby(process, command) and not any(helper in " ".join(command) for helper in HELPERS)
    ]
