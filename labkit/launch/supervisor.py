"""The supervisor of one run: forks the ranks, watches them, ends the run in exactly one terminal state.

It has one thread and never waits for a rank without a bound. It reads `stop.json` and the shared board, reaps ranks,
names the one at fault, and writes status, progress and summary. Ranks die when it dies.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory, read_json, write_json
from labkit.launch import rendezvous
from labkit.launch.board import Board
from labkit.launch.child import Child, fork_rank
from labkit.launch.network import Hosts
from labkit.runs import environment, logs, summary
from labkit.runs import status as run_status
from labkit.runs.processes import identity

RANK_ENTRY = "labkit.training.worker:main"
"""Named, not imported: this side and the ranks' side meet in the experiment and on disk only."""
POLL_S = 0.1
PROGRESS_EVERY_S = 0.5
SETTLE_S = 3.0
"""How long the other ranks get to end by themselves after one has failed."""
KILL_AFTER_S = 3.0
"""Time between SIGTERM and SIGKILL."""
HELD_UP_S = 0.5
"""A rank that has not moved for so long when the time to stop is over is the one that the others wait for."""


STACK_LINES = 60
"""The stacks of all threads of a silent rank; where it hangs stands at the top of the last one."""


class Supervisor:
    """Everything that one run needs while it runs."""

    def __init__(self, directory: RunDirectory, experiment: Experiment, order: dict[str, Any]) -> None:
        self.directory, self.experiment, self.order = directory, experiment, order
        self.board = Board(experiment.layout.world_size)
        self.started = time.monotonic()
        self.children: list[Child] = []
        self.stop: dict[str, Any] | None = None
        """Why the run is being stopped."""
        self.fault: dict[str, Any] | None = None
        """A standstill, and whom to blame for it."""
        self.deadline: float | None = None
        """From here on ranks are ended by force."""
        self.held_up_by: list[int] = []
        """Ranks for which the others were still waiting when the time to stop was over."""
        self.next_progress = 0.0
        self.rendezvous = rendezvous.make_folder()

    def start(self) -> None:
        """Fork the ranks. Called in the only thread of this process: the parent-death signal is tied to it."""
        module, _, name = self.order.get("entry", RANK_ENTRY).partition(":")
        entry = getattr(import_module(module), name)
        network = self.experiment.launch.network
        hosts = None if network is None else Hosts(network, self.board.world_size)
        for rank in range(self.board.world_size):
            run = partial(
                entry,
                directory=self.directory,
                experiment=self.experiment,
                rank=rank,
                board=self.board,
                rendezvous=str(self.rendezvous / "store"),
                requested=self.order["requested"],
                resume=self.order.get("resume"),
            )
            pipes = [child.pipe for child in self.children]
            self.children.append(fork_rank(rank, self.directory, self.experiment, run, pipes, hosts))
        if hosts is not None:
            hosts.close()

    def watch(self) -> dict[str, Any]:
        """Until all ranks have ended; returns the terminal changes of the status."""
        signals = {signal.SIGCHLD, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        while any(child.running for child in self.children):
            caught = signal.sigtimedwait(signals, POLL_S)
            if caught is not None and caught.si_signo == signal.SIGTERM:
                self._begin_stop("stop", "the supervisor was asked to end (SIGTERM)")
            for child in self.children:
                if child.reap():
                    # Native code may leave with exit code 0 in the middle of the training.
                    child.left_early = child.exit_code == 0 and self.board.place(child.rank).phase != "done"
                    if child.failed:
                        self._end_by(time.monotonic() + SETTLE_S)
            self._look_for_stop()
            self._look_for_directory()
            self._look_for_standstill()
            self._enforce_deadline()
            self._write_progress()
        return self._verdict()

    # -- what may happen ----------------------------------------------------------------------------------------------

    def _look_for_stop(self) -> None:
        if self.stop is not None:
            return
        limit = self.experiment.launch.max_duration_s
        if self.directory.stop.exists():
            request = read_json(self.directory.stop)
            grace = request.get("grace_s") if isinstance(request, dict) else None
            self._begin_stop("stop", "stopped on request", grace)
        elif time.monotonic() - self.started > limit:
            self._begin_stop("duration", f"launch.max_duration_s of {limit:g} s is over")

    def _look_for_directory(self) -> None:
        """Without its directory a run can neither be seen nor be stopped: it must not go on."""
        if self.fault is None and not self.directory.path.is_dir():
            self.fault = run_status.cause("disk", f"the run directory {self.directory.path} was removed")
            self._end_by(time.monotonic())

    def _begin_stop(self, kind: str, message: str, grace: Any = None) -> None:
        if self.stop is not None:
            return
        self.stop = run_status.cause(kind, message)
        # Read from a file, so it may be anything, NaN included.
        believable = isinstance(grace, int | float) and 0 <= grace < 86400
        grace_s = float(grace) if believable else self.experiment.launch.grace_s
        self._end_by(time.monotonic() + grace_s)
        self.board.request_stop()
        self._try(lambda: run_status.update(self.directory, state="stopping"))

    def _look_for_standstill(self) -> None:
        if self.deadline is not None:
            return
        limit = self.experiment.launch.timeout_s
        guilty = self.board.silent(limit, [child.rank for child in self.children if child.running])
        if not guilty:
            return
        for child in self.children:  # each rank writes the stacks of its threads to its log
            if child.running:
                child.send(signal.SIGUSR1)
        time.sleep(0.2)
        place = self.board.place(guilty[0])
        silence = time.monotonic() - place.progress
        self.fault = run_status.cause(
            "silent",
            f"{_ranks(guilty)} {'is' if len(guilty) == 1 else 'are'} silent for {silence:.0f} s, in {place.phase} "
            f"of step {place.step} (launch.timeout_s is {limit:g})",
            rank=guilty[0],
            log=logs.tail(self.directory.log(guilty[0]), STACK_LINES),
        )
        self._end_by(time.monotonic())

    def _end_by(self, moment: float) -> None:
        self.deadline = moment if self.deadline is None else min(self.deadline, moment)

    def _enforce_deadline(self) -> None:
        """SIGTERM when the time is over, SIGKILL a little later."""
        now = time.monotonic()
        if self.deadline is None or now < self.deadline:
            return
        if all(child.terminated is None for child in self.children):
            self.held_up_by = self.board.silent(HELD_UP_S, [child.rank for child in self.children if child.running])
        for child in self.children:
            if child.running and child.terminated is None:
                child.terminated = now
                child.send(signal.SIGTERM)
            elif child.running and child.terminated is not None and now - child.terminated > KILL_AFTER_S:
                child.send(signal.SIGKILL)

    def _write_progress(self) -> None:
        now = time.monotonic()
        if now < self.next_progress:
            return
        self.next_progress = now + PROGRESS_EVERY_S
        ranks = []
        for child in self.children:
            place = self.board.place(child.rank)
            ranks.append(
                {
                    "rank": child.rank,
                    "step": place.step,
                    "phase": place.phase if child.running else "done",
                    "silent_s": round(now - place.progress, 2) if child.running else 0.0,
                    "memory_bytes": place.memory_bytes,
                }
            )
        self._try(lambda: write_json(self.directory.progress, {"time": time.time(), "ranks": ranks}))
        for child in self.children:
            self._try(partial(logs.cap, self.directory.log(child.rank)))

    @staticmethod
    def _try(action: Callable[[], Any]) -> None:
        """A full disk must not end the watch: the rank that cannot write reports it."""
        try:
            action()
        except OSError as error:
            _say(f"cannot write: {error}")

    # -- the end ------------------------------------------------------------------------------------------------------

    def _verdict(self) -> dict[str, Any]:
        """The terminal state, and the cause if it is not `finished`."""
        failure = self.fault or self._first_failure()
        if self.stop is None:
            return {"state": "failed" if failure else "finished", "cause": failure}
        if all(child.exit_code == 0 for child in self.children):
            return {"state": "finished", "cause": None}  # the request came after the last step
        killed = [child.rank for child in self.children if child.terminated is not None]
        if failure is not None and not killed:
            return {"state": "failed", "cause": failure}  # it failed by itself while it was being stopped
        if killed:
            late = self.held_up_by or killed
            self.stop["message"] += f"; {_ranks(late)} did not end in time, so {_ranks(killed)} had to be killed"
            self.stop |= {"rank": late[0], "log": logs.tail(self.directory.log(late[0]))}
        return {"state": "stopped", "cause": self.stop}

    def _first_failure(self) -> dict[str, Any] | None:
        """The rank that failed first for a reason of its own; the others merely lost their peer."""
        failed = [child for child in self.children if child.failed and child.terminated is None]
        if not failed:
            return None
        child = min(failed, key=lambda child: (child.lost_peer, child.ended))
        log = logs.tail(self.directory.log(child.rank))
        if child.signal is not None:
            name = signal.Signals(child.signal).name
            hint = "; the machine may have run out of memory" if child.signal == signal.SIGKILL else ""
            said = f"rank {child.rank} was killed by {name}{hint}"
            return run_status.cause("signal", said, rank=child.rank, signal=name, log=log)
        report = child.report or {
            "type": "SystemExit",
            "message": f"exit code {child.exit_code}" + (" before it was done" if child.left_early else ""),
        }
        if report.get("task"):  # a request gone wrong: one sentence, and no stack of ours (the log has it)
            return run_status.cause("task", str(report["task"]), rank=child.rank)
        exception = f"{report['type']}: {report['message']}"
        first_line = exception.splitlines()[0][:500]
        if report.get("disk_full"):
            kind, said = (
                "disk",
                f"rank {child.rank} cannot write: the disk under the run directory is full ({first_line})",
            )
        else:
            kind, said = "exception", f"rank {child.rank} raised {first_line}"
        log = log or report.get("traceback", "").splitlines()[-20:]
        return run_status.cause(kind, said, rank=child.rank, exception=exception, log=log)

    def clean_up(self) -> None:
        shutil.rmtree(self.rendezvous, ignore_errors=True)


def supervise(order: dict[str, Any]) -> int:
    """Carry out one order to its terminal state; returns the exit code of the supervisor process."""
    directory = RunDirectory(Path(order["run"]))
    supervisor: Supervisor | None = None
    try:
        os.chdir(order["cwd"])
        sys.path.append(order["cwd"])  # behind the libraries: a file there must not stand in for one of theirs
        os.environ.update(order.get("environment", {}))
        supervisor = Supervisor(directory, Experiment.of_run(directory), order)
        supervisor.start()
        run_status.update(
            directory,
            state="running",
            started=time.time(),
            supervisor=identity(os.getpid()),
            ranks=[{"rank": child.rank} | identity(child.pid) for child in supervisor.children],
        )
        # After the fork, so that it costs the first step nothing.
        supervisor._try(lambda: environment.record(directory, order["cwd"]))
        changes = supervisor.watch()
    except BaseException as error:
        traceback.print_exc()
        said = f"the supervisor failed: {type(error).__name__}: {error}"
        changes = {"state": "failed", "cause": run_status.cause("supervisor", said)}
    finally:
        if supervisor is not None:
            supervisor.clean_up()
    try:
        summary.write(directory, changes["state"], order.get("baseline"))
    except Exception as error:
        # A full disk, or events that nobody can read: the state matters more than its summary.
        _say(f"no summary: {error!r}")
    run_status.update(directory, **changes)
    return 0 if changes["state"] == "finished" else 1


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(map(str, ranks))


def _say(text: str) -> None:
    try:
        print(f"labkit: {text}", file=sys.stderr, flush=True)  # noqa: T201  (the log of the supervisor)
    except OSError:
        pass
