"""Whatever is killed, hangs or breaks: one terminal state in time, the cause by name, nothing left, nothing lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.run_directory import read_json, write_json
from labkit.launch import client, launch, standby_pid, warm
from labkit.runs import Run, RunFailed
from labkit.runs.processes import alive, identity
from tests.launch import helpers
from tests.launch.faulty import AT_STEP
from tests.launch.helpers import ENDLESS, Watched, events, faulty, start, steps_written, tiny, wait_until

# What a bound adds for two cores that others use too.
SLACK_S = 5.0


# -- killed -----------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_named_with_its_signal() -> None:
    with Watched(start(tiny(steps=ENDLESS))) as watch:
        ranks = watch.begun()
        os.kill(ranks["rank 1"]["pid"], signal.SIGKILL)
        cause = watch.ends("failed", within=3 + SLACK_S, kind="signal")
    assert (cause["rank"], cause["signal"]) == (1, "SIGKILL")
    assert "rank 1 was killed by SIGKILL" in cause["message"]
    with pytest.raises(RunFailed, match="rank 1 was killed by SIGKILL"):
        watch.run.result()


def test_a_killed_rank_takes_its_loader_processes_along() -> None:
    with Watched(start(tiny(steps=ENDLESS, training__loader_workers=1))) as watch:
        ranks = watch.begun()
        own = {(known["pid"], known["start_time"]) for known in ranks.values()}
        loaders = [known for known in watch.processes if (known["pid"], known["start_time"]) not in own]
        assert len(loaders) == 2, "one loader process a rank"
        os.kill(ranks["rank 0"]["pid"], signal.SIGKILL)
        watch.ends("failed", within=3 + SLACK_S, kind="signal")
        wait_until(lambda: not any(map(alive, loaders)), 10, "the loader processes gone")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, labkit_home: Path) -> Iterator[Path]:
    """An empty temporary directory with a short path, for a standby of its own."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        client.close()
        yield Path(folder)
        client.close()


def left_in(folder: Path) -> list[str]:
    """Return what runs have left in a temporary directory (torch keeps an empty folder of its compiler there)."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


@pytest.mark.parametrize("victim", ["rank", "loader", "supervisor"])
def test_whatever_is_killed_leaves_no_folder_of_its_loader_processes(temporary: Path, victim: str) -> None:
    """issue 11, F13: multiprocessing makes pymp-* for sockets, and only a process that ends well removes its own."""
    with Watched(start(tiny(steps=ENDLESS, training__loader_workers=1))) as watch:
        processes = watch.begun()
        inside = [path.name for path in temporary.rglob("*")]
        own = {entry["pid"] for entry in processes.values()}
        loader = next(entry["pid"] for entry in watch.processes if entry["pid"] not in own)
        pids = {"rank": processes["rank 1"]["pid"], "supervisor": processes["supervisor"]["pid"], "loader": loader}
        os.kill(pids[victim], signal.SIGKILL)
        watch.ends("failed", within=20 + SLACK_S)
    assert any(name.startswith("labkit-meet-") for name in inside), "it is the temporary directory of this run"
    if victim == "supervisor":  # the next run removes what it has left
        assert launch(tiny(steps=3), baseline=None).wait(60).state == "finished"
    # A standby that is just starting has files there for a moment (ctypes asks the compiler for libraries).
    wait_until(lambda: not left_in(temporary), 10, f"an empty temporary directory, not {left_in(temporary)}")


def test_loader_processes_work_beside_a_temporary_directory_with_a_long_path(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 11, F30: the path of a socket has about a hundred characters."""
    deep = temporary / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(deep))
    run = start(tiny(steps=4, training__loader_workers=1, launch__timeout_s=10)).wait(60)
    assert run.state == "finished", run.cause
    wait_until(lambda: not left_in(deep), 10, f"an empty temporary directory, not {left_in(deep)}")


def test_a_killed_supervisor_takes_its_ranks_along() -> None:
    with Watched(start(tiny(steps=ENDLESS))) as watch:
        known = watch.begun()
        os.kill(known["supervisor"]["pid"], signal.SIGKILL)
        wait_until(lambda: not any(map(alive, known.values())), 2, "the ranks dead with their supervisor")
        cause = watch.ends("failed", within=1, kind="supervisor")
    assert "supervisor was killed" in cause["message"]


def test_a_killed_standby_disturbs_no_run_and_is_replaced() -> None:
    with Watched(start(faulty("slow", steps=100))) as watch:
        watch.begun()
        before = standby_pid()
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: standby_pid() is None, 2, "the standby gone")
        with Watched(launch(tiny(), baseline=None)) as second:
            second.ends("finished", within=30)
        assert standby_pid() not in (None, before)
        watch.ends("finished", within=30)


_KILLED_AFTER_ITS_FORK = """
import gc, os, signal, time
fork, freeze = os.fork, gc.freeze
def forked():
    os.fork = fork
    pid = fork()
    if pid:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)  # nobody has locked the run yet, and its launcher is dead
    return pid
def patched():  # called by the standby once it is ready
    os.fork = forked
    freeze()
gc.freeze = patched
"""


def test_a_standby_that_is_killed_right_after_its_fork_disturbs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 11, F6: readers wait for the supervisor that is about to lock the run."""
    (tmp_path / "sitecustomize.py").write_text(_KILLED_AFTER_ITS_FORK)
    client.close()
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
        warm(60)
    with Watched(launch(tiny(), baseline=None)) as watch:
        wait_until(lambda: standby_pid() is None, 10, "the standby killed")
        assert watch.run.state in ("starting", "running"), watch.run.cause  # a reader, in the middle of it
        watch.ends("finished", within=60)
    assert "failed" not in watch.states


def test_an_order_that_died_with_the_standby_fails_by_name() -> None:
    client.close()
    run = launch(tiny(), baseline=None)  # the standby still imports torch
    with Watched(run) as watch:
        pid = standby_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        cause = watch.ends("failed", within=2, kind="supervisor")
    assert "launcher died before the run began" in cause["message"]


def test_a_standby_that_dies_while_it_is_asked_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    warm(60)
    standby = client._standby
    assert standby is not None
    standby.process.kill()
    standby.process.wait(5)
    with monkeypatch.context() as patched:
        patched.setattr(client.Standby, "alive", property(lambda self: True))
        run = launch(tiny(), baseline=None)
    assert run.state == "failed"
    assert run.cause is not None
    assert "cannot launch" in run.cause["message"]
    client.close()  # with the order still in its buffer


# -- stopped ----------------------------------------------------------------------------------------------------------


def test_stop_ends_after_the_step_with_a_checkpoint() -> None:
    with Watched(start(tiny(steps=ENDLESS, training__checkpoint_every=None))) as watch:
        watch.begun()
        assert watch.run.stop().state == "stopped"
        cause = watch.ends("stopped", within=1, kind="stop")
    assert cause["message"] == "stopped on request"
    done = [steps_written(watch.run, rank) for rank in (0, 1)]
    assert done[0] == done[1], "all ranks stop after the same step"
    assert watch.run.checkpoints() == [done[0]]
    assert [events(watch.run, rank)[-1]["event"] for rank in (0, 1)] == ["end", "end"]
    assert watch.states == ["running", "stopping", "stopped"] or watch.states[1:] == ["running", "stopping", "stopped"]


def test_stop_in_the_middle_of_a_collective_is_bounded() -> None:
    with Watched(start(tiny(steps=ENDLESS))) as watch:
        ranks = watch.begun()
        os.kill(ranks["rank 1"]["pid"], signal.SIGSTOP)

        def waits() -> bool:
            progress = read_json(watch.run.directory.progress)["ranks"]
            return progress[0]["phase"] == "backward" and min(rank["silent_s"] for rank in progress) > 0.6

        wait_until(waits, 10, "rank 0 waiting in the all-reduce")
        begun = time.monotonic()
        watch.run.stop(grace=1)
        assert time.monotonic() - begun < 1 + 3 + SLACK_S
        cause = watch.ends("stopped", within=1, kind="stop")
    assert cause["rank"] == 1
    assert "rank 1 did not end in time" in cause["message"]


def test_a_supervisor_that_does_not_obey_is_killed() -> None:
    with Watched(start(tiny(steps=ENDLESS))) as watch:
        known = watch.begun()
        os.kill(known["supervisor"]["pid"], signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("labkit.runs.run.OVERTIME_S", 2.0)
            assert watch.run.stop(grace=0).state == "failed"
        assert time.monotonic() - begun < 2 + SLACK_S
        watch.ends("failed", within=1, kind="supervisor")


def test_a_request_to_stop_may_hold_anything() -> None:
    with Watched(start(tiny(steps=ENDLESS))) as watch:
        watch.begun()
        watch.run.directory.stop.write_text('{"grace_s": NaN, "requested": []}')
        watch.ends("stopped", within=10 + SLACK_S, kind="stop")


def test_a_run_ends_when_its_time_is_over() -> None:
    with Watched(start(tiny(steps=ENDLESS, launch__max_duration_s=1.5))) as watch:
        cause = watch.ends("stopped", within=1.5 + SLACK_S, kind="duration")
    assert "max_duration_s of 1.5 s" in cause["message"]
    assert steps_written(watch.run, 0) == steps_written(watch.run, 1)


def test_a_request_after_the_last_step_leaves_it_finished() -> None:
    run = start(tiny(steps=5)).wait(30)
    before = run.directory.status.read_bytes()
    run.stop()
    assert run.state == "finished"
    assert run.directory.status.read_bytes() == before


# -- broken -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_is_named_with_its_exception() -> None:
    with Watched(start(faulty("raises", steps=ENDLESS))) as watch:
        cause = watch.ends("failed", within=20, kind="exception")
    assert cause["rank"] == 1
    assert cause["exception"] == "ValueError: the data of this rank is bad"
    assert "rank 1 raised ValueError: the data of this rank is bad" in cause["message"]
    assert any("faulty.py" in line for line in cause["log"]), "the last lines of its log show where"
    assert steps_written(watch.run, 1) == AT_STEP - 1, "the steps before the fault are on record"
    error = next(event for event in events(watch.run, 1) if event["event"] == "error")
    assert error["type"] == "ValueError"
    assert "in fault" in error["traceback"]


@pytest.mark.parametrize(
    ("function", "said"),
    [("raises_a_long_story", "ValueError: schöne Bescherung"), ("exits", "SystemExit: 0")],
)
def test_odd_ends_of_a_rank_are_named_too(function: str, said: str) -> None:
    with Watched(start(faulty(function, steps=ENDLESS))) as watch:
        cause = watch.ends("failed", within=20, kind="exception")
    assert cause["rank"] == 1
    assert said in cause["message"]
    assert len(cause["message"]) < 1000


def test_a_rank_that_raises_alone_or_before_its_first_step() -> None:
    for ranks, function, kind, said in (
        (1, "raises", "exception", "bad"),
        (2, "cannot_be_built", "task", "cannot_be_built raised RuntimeError: no such data here (faulty.py, line "),
    ):
        with Watched(start(faulty(function, ranks=ranks, steps=ENDLESS))) as watch:
            cause = watch.ends("failed", within=20, kind=kind)
        assert said in cause["message"]


def test_a_rank_that_leaves_with_exit_code_zero_before_its_end_has_failed() -> None:
    with Watched(start(faulty("leaves_with_exit_code_zero", steps=ENDLESS))) as watch:
        cause = watch.ends("failed", within=20, kind="exception")
    assert cause["rank"] == 1
    assert "exit code 0 before it was done" in cause["message"]


def test_a_run_whose_directory_is_removed_ends() -> None:
    run = start(faulty("slow", steps=ENDLESS))
    wait_until(lambda: steps_written(run, 1) > 0, 60, "steps")
    known = [run.status["supervisor"], *run.status["ranks"]]
    shutil.rmtree(run.directory.path)
    wait_until(lambda: not any(map(alive, known)), 10, "the end of all its processes")


def test_settings_of_accelerate_in_the_shell_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = start(faulty("slow", steps=5))
    plain.result(60)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("LABKIT_STANDBY", "0")  # a standby of its own, which sees the variable
    other = start(faulty("slow", steps=5))
    other.result(60)
    assert list(other.data().loss) == list(plain.data().loss)


def test_a_rank_that_hangs_is_named_with_its_place() -> None:
    with Watched(start(faulty("hangs", steps=ENDLESS, launch__timeout_s=2))) as watch:
        watch.begun(AT_STEP - 1)
        cause = watch.ends("failed", within=2 + 3 + SLACK_S, kind="silent")
    assert cause["rank"] == 1
    assert f"rank 1 has been silent for 2 s, in forward of step {AT_STEP - 1}" in cause["message"]
    assert any("hang_forever" in line for line in cause["log"]), "its stack is in the log"


def test_a_rank_that_is_frozen_is_named() -> None:
    with Watched(start(tiny(steps=ENDLESS, launch__timeout_s=2))) as watch:
        ranks = watch.begun()
        os.kill(ranks["rank 0"]["pid"], signal.SIGSTOP)
        cause = watch.ends("failed", within=2 + 3 + SLACK_S, kind="silent")
    assert cause["rank"] == 0
    assert "rank 0 has been silent" in cause["message"]


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1) to mount a small disk")
def test_a_full_disk_ends_the_run_by_name(tmp_path: Path) -> None:
    mapped = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--mount", *mapped, sys.executable, "-m", "tests.launch.full_disk", str(tmp_path)]
    if subprocess.run([*command[: 2 + len(mapped)], "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no mount namespace")
    root = Path(helpers.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(f"a small disk cannot be mounted here: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all proved"


def test_a_standby_that_cannot_import_fails_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerate.py").write_text('raise ImportError("accelerate is broken here")\n')
    client.close()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        with Watched(launch(tiny(), baseline=None)) as watch:
            cause = watch.ends("failed", within=30, kind="supervisor")
        assert any("accelerate is broken here" in line for line in cause["log"])
        assert not warm(30), "a broken standby does not count as ready"
    finally:
        client.close()


def test_a_workload_that_cannot_be_preloaded_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if a package were missing that one workload alone needs.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['labkit.workloads.driving_task'] = None\n")
    client.close()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        with Watched(launch(tiny(), baseline=None)) as watch:
            watch.ends("finished", within=40)
    finally:
        client.close()


# -- side by side -----------------------------------------------------------------------------------------------------


def test_two_runs_at_once_do_not_touch_each_other() -> None:
    experiments = [faulty("slow", steps=60, training__seed=seed) for seed in (0, 1)]
    runs = [start(experiment) for experiment in experiments]
    assert runs[0].id != runs[1].id
    with Watched(runs[0]) as first, Watched(runs[1]) as second:
        known = [first.begun(), second.begun()]
        pids = [entry["pid"] for processes in known for entry in processes.values()]
        assert len(set(pids)) == 6
        assert all(alive(entry) for processes in known for entry in processes.values()), "both at the same time"
        first.ends("finished", within=60)
        second.ends("finished", within=60)
    alone = start(experiments[0]).wait(60)
    assert runs[0].data().loss.tolist() == alone.data().loss.tolist()
    assert runs[0].data().loss.tolist() != runs[1].data().loss.tolist()


def test_two_homes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for name in ("one", "other"):
        monkeypatch.setenv("LABKIT_HOME", str(tmp_path / name))
        runs.append(start(tiny()))
        assert [run.id for run in Run.all()] == [runs[-1].id]
    for run, name in zip(runs, ("one", "other"), strict=True):
        assert run.wait(30).state == "finished"
        assert run.directory.path.parent == tmp_path / name / "runs"
        assert len(list((tmp_path / name / "runs").iterdir())) == 1


def test_without_a_standby_each_run_starts_cold_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    client.close()
    monkeypatch.setenv("LABKIT_STANDBY", "0")
    assert not warm(1)
    with Watched(launch(tiny(), baseline=None)) as watch:
        launcher = watch.run.status["launcher"]
        assert alive(launcher)
        assert standby_pid() is None
        watch.ends("finished", within=40)
        wait_until(lambda: not alive(launcher), 3, "the launcher gone")


def test_a_run_directory_cannot_be_taken_twice() -> None:
    runs = [start(tiny()) for _ in range(3)]
    assert len({run.id for run in runs}) == 3
    assert [run.wait(60).state for run in runs] == ["finished"] * 3


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_run_launches_nothing(labkit_home: Path) -> None:
    before = standby_pid()
    with pytest.raises(ExperimentError):
        launch(Experiment().set({"training.global_batch": 1, "layout.dp_replicate": 2}))
    with pytest.raises(ExperimentError, match="has no checkpoint"):
        launch(tiny(), resume=_run_without_checkpoint(labkit_home))
    with pytest.raises(ExperimentError, match="there is no run"):
        launch(tiny(), resume="20200101-0000-nowhere")
    assert len(list((labkit_home / "runs").iterdir())) == 1, "only the directory made by this test"
    assert standby_pid() == before


def _run_without_checkpoint(home: Path) -> Run:
    path = home / "runs" / "20200101-0000-vision-dp2"
    path.mkdir(parents=True)
    write_json(path / "experiment.json", tiny().to_dict())
    write_json(path / "status.json", {"state": "finished"})
    return Run.attach(path.name)


# -- the notebook's side ----------------------------------------------------------------------------------------------

PRELUDE = """
import os
from labkit.launch import launch, standby_pid, warm
from labkit.runs import Run
from tests.launch.helpers import ENDLESS, tiny
"""


class Kernel:
    """A real Jupyter kernel in which cells can be run."""

    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        self.manager: Any = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(Path(helpers.__file__).parents[2]))
        self._connect()

    def _connect(self) -> None:
        self.client: Any = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        assert self.run(PRELUDE)["status"] == "ok"

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)

    def send(self, code: str) -> str:
        return str(self.client.execute(code, store_history=False))

    def reply(self, message: str, timeout: float = 60) -> dict[str, Any]:
        while True:
            answer = self.client.get_shell_msg(timeout=timeout)
            if answer["parent_header"].get("msg_id") == message:
                return dict(answer["content"])

    def run(self, code: str) -> dict[str, Any]:
        return self.reply(self.send(code))

    def value(self, expression: str) -> Any:
        message = self.client.execute("", user_expressions={"value": expression}, store_history=False)
        found = self.reply(message)["user_expressions"]["value"]
        assert found["status"] == "ok", found
        return eval(found["data"]["text/plain"])

    def launch(self) -> Watched:
        """An endless run started in a cell, held from here."""
        assert self.run("run = launch(tiny(steps=ENDLESS), baseline=None)")["status"] == "ok"
        return Watched(Run.attach(self.value("run.id")))

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel(now=False)
        self._connect()

    def close(self) -> None:
        self.client.stop_channels()
        if self.manager.is_alive():
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    pytest.importorskip("ipykernel", reason="needs the extra lab")
    kernel = Kernel()
    yield kernel
    kernel.close()


def test_a_killed_kernel_takes_its_standby_along_and_leaves_the_run(kernel: Kernel) -> None:
    with kernel.launch() as watch:
        known = watch.begun()
        assert kernel.value("warm(60)")
        standby = identity(kernel.value("standby_pid()"))
        assert alive(standby)
        os.kill(kernel.pid, signal.SIGKILL)
        wait_until(lambda: not alive(standby), 3, "the standby dead with its kernel")
        before = steps_written(watch.run, 0)
        wait_until(lambda: steps_written(watch.run, 0) > before, 5, "the run going on")
        assert all(alive(entry) for entry in known.values())
        assert watch.run.stop().state == "stopped"


def test_an_interrupt_of_the_kernel_leaves_run_and_standby_alone(kernel: Kernel) -> None:
    with kernel.launch() as watch:
        known = watch.begun()
        standby = identity(kernel.value("standby_pid()"))
        waiting = kernel.send("run.wait()")
        time.sleep(0.5)
        kernel.manager.interrupt_kernel()  # SIGINT to the kernel's whole process group
        assert kernel.reply(waiting)["ename"] == "KeyboardInterrupt"
        before = steps_written(watch.run, 0)
        wait_until(lambda: steps_written(watch.run, 0) > before, 5, "the run going on")
        assert all(alive(entry) for entry in known.values())
        assert alive(standby)
        assert kernel.value("standby_pid()") == standby["pid"]
        assert kernel.value("run.stop().state") == "stopped"


def test_a_restarted_kernel_attaches_to_the_run(kernel: Kernel) -> None:
    with kernel.launch() as watch:
        known = watch.begun()
        standby, before = identity(kernel.value("standby_pid()")), kernel.pid
        kernel.restart()
        assert kernel.pid != before
        wait_until(lambda: not alive(standby), 5, "the old standby gone")
        assert all(alive(entry) for entry in known.values())
        assert kernel.value(f"Run.attach({watch.run.id!r}).state") == "running"
        table = kernel.value(f"Run.attach({watch.run.id!r}).events()['loss'].notna().sum().item()")
        assert table > 0
        assert kernel.value("Run.attach('last').stop().state") == "stopped"
        watch.ends("stopped", within=1, kind="stop")


def test_a_kernel_changes_no_signal_handler_and_starts_no_thread() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers], threading.active_count()
    start(tiny(steps=3)).wait(30)
    assert ([signal.getsignal(number) for number in numbers], threading.active_count()) == before


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ("raise ValueError('bad data')", "rank 0 raised ValueError: bad data"),
        ("sys.exit()", "rank 0 raised SystemExit: 0"),
    ],
)
def test_a_rank_without_its_standard_output_ends_as_itself(tmp_path: Path, ends: str, words: str) -> None:
    """It failed when it flushed its output at the end, and went on as a second supervisor."""
    task = tmp_path / "mute.py"
    task.write_text(
        "import sys\nimport torch\n"
        "class Net(torch.nn.Linear):\n"
        "    passes = 0\n"
        "    def forward(self, x):\n"
        "        Net.passes += 1\n"
        "        if Net.passes > 60:\n"
        "            sys.stdout = sys.stderr = None\n"
        f"            {ends}\n"
        "        return super().forward(x)\n"
        "def make_task():\n"
        "    x, y = torch.randn(32, 4), torch.randint(3, (32,))\n"
        "    return Net(4, 3), (x, y), (x, y), torch.nn.CrossEntropyLoss()\n"
    )
    run = start(tiny(1, 100, workload={"name": "custom", "path": f"{task}:make_task"}))
    run.wait(60)
    assert run.state == "failed"
    assert words in (run.cause or {})["message"], run.cause


@pytest.mark.slow  # it waits ten times launch.timeout_s
def test_a_rank_that_hangs_while_it_builds_its_task_is_named(tmp_path: Path) -> None:
    """The other one waits for it in the comparison: its collective must not give up before the supervisor does."""
    task = tmp_path / "hangs.py"
    task.write_text(
        "import os, time\nimport torch\n"
        "def make_task():\n"
        "    while os.environ['RANK'] == '1':\n"
        "        time.sleep(0.1)\n"
        "    x, y = torch.randn(32, 4), torch.randint(3, (32,))\n"
        "    return torch.nn.Linear(4, 3), (x, y), (x, y), torch.nn.CrossEntropyLoss()\n"
    )
    run = start(tiny(workload={"name": "custom", "path": f"{task}:make_task"}, launch__timeout_s=4.0))
    run.wait(90)
    cause = run.cause or {}
    assert cause["kind"] == "silent"
    assert cause["rank"] == 1
    assert re.match(r"rank 1 has been silent for 4\d s, in setup", cause["message"]), cause
