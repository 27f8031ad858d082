"""The supervisor of one run: forks the ranks, watches them, ends the run in exactly one terminal state.

It holds the lock of the run for its life. It has one thread and never waits for a rank without a bound. It reads
`stop.json` and the shared board, reaps ranks, names the one at fault, and writes status, progress and summary. Ranks
die when it dies, and before it writes the end, everything that they have started is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.failures import message_of
from labkit.experiment.run_directory import EXIT_STOPPED, TERMINAL, RunDirectory, read_json, write_json
from labkit.launch import rendezvous
from labkit.launch.board import Board
from labkit.launch.child import Child, fork_rank
from labkit.launch.descendants import Strays, end_descendants
from labkit.launch.stacks import main_thread, waits_for_others
from labkit.netem.hosts import Hosts
from labkit.runs import environment, liveness, logs, summary
from labkit.runs import status as run_status
from labkit.runs.leftovers import remove_unfinished
from labkit.runs.processes import adopt_orphans, identity

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


STACKS_S = 2.0
"""How long ranks get to write their stacks; one that is frozen or floods its log never shows them."""
STACK_LINES = 60
"""The stacks of all threads of a silent rank; where it hangs stands at the top of the last one."""


class Supervisor:
    """Everything that one run needs while it runs."""

    def __init__(
        self,
        directory: RunDirectory,
        experiment: Experiment,
        order: dict[str, Any],
        known: dict[str, Any],
        lock: liveness.Lock | None,
    ) -> None:
        self.directory, self.experiment, self.order = directory, experiment, order
        self.known = known
        """The status as last written: the file may be damaged while the run goes on."""
        self.written: tuple[int, int] | None = None
        """Inode and time of the status as last written."""
        self.lock = lock
        self.strays = Strays()
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
        self.meeting = rendezvous.make_folder()

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
                rendezvous=str(self.meeting.path / "store"),
                requested=self.order["requested"],
                resume=self.order.get("resume"),
            )
            own = [child.pipe for child in self.children] + [self.meeting.lock.descriptor]
            own += [self.lock.descriptor] if self.lock is not None else []
            self.children.append(fork_rank(rank, self.directory, self.experiment, run, own, self.meeting.path, hosts))
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
                    # Code of others may leave with an exit code that means well in the middle of the training.
                    means_well = child.exit_code == 0 or (child.exit_code == EXIT_STOPPED and self.stop is not None)
                    done = self.board.place(child.rank).phase == "done"
                    child.left_early = child.exit_code in (0, EXIT_STOPPED) and not (means_well and done)
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
        self.note(state="stopping")

    def note(self, **changes: Any) -> None:
        """Change the status. Where somebody has written an end, the ranks end too: one run never shows two states."""

        def write() -> None:
            self.known = run_status.update(self.directory, known=self.known, **changes)
            self.written = _signature(self.directory)

        self._try(write)
        if self.known.get("state") in TERMINAL:
            self.fault = self.fault or run_status.cause("supervisor", "another process has written the end of this run")
            self._end_by(time.monotonic())

    def _look_at_status(self) -> None:
        """Nobody else writes the status while the run goes on: what has become of it is mended, an end is obeyed."""
        if self.fault is None and self.written is not None and _signature(self.directory) != self.written:
            self.note()

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
        patience = time.monotonic() + STACKS_S
        while True:
            time.sleep(0.1)
            stacks = {rank: logs.tail(self.directory.log(rank), STACK_LINES) for rank in guilty}
            if all(map(main_thread, stacks.values())) or time.monotonic() > patience:
                break
        # Of those that are equally far, e.g. all in the set-up, one hangs and the others wait for it.
        guilty = [rank for rank in guilty if not waits_for_others(stacks[rank])] or guilty
        place = self.board.place(guilty[0])
        silence = time.monotonic() - place.progress
        self.fault = run_status.cause(
            "silent",
            f"{_ranks(guilty)} {'is' if len(guilty) == 1 else 'are'} silent for {silence:.0f} s, in {place.phase} "
            f"of step {place.step} (launch.timeout_s is {limit:g})",
            rank=guilty[0],
            log=stacks[guilty[0]],
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
        self.strays.reap({child.pid for child in self.children if child.running})
        if self.lock is not None:
            self._try(self.lock.beat)
        self._look_at_status()
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
        self._cap_logs()

    def _cap_logs(self) -> None:
        for path in (*(self.directory.log(child.rank) for child in self.children), self.directory.supervisor_log):
            self._try(partial(logs.cap, path))

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
        report = child.report or {"type": "SystemExit", "message": f"exit code {child.exit_code}"}
        if report.get("task"):  # a request gone wrong: one sentence, and no stack of ours (the log has it)
            return run_status.cause("task", str(report["task"]), rank=child.rank)
        exception = f"{report['type']}: {report['message']}"
        first_line = exception.splitlines()[0][:500]
        if child.left_early or child.report is None:
            early = " before it was done" if self.board.place(child.rank).phase != "done" else ""
            early = early or (", which means that it was asked to stop; nobody asked it" if child.left_early else "")
            by = f" ({first_line})" if child.report else ""
            kind, said = "exception", f"rank {child.rank} left with exit code {child.exit_code}{early}{by}"
        elif report.get("disk_full"):
            kind, said = (
                "disk",
                f"rank {child.rank} cannot write: the disk under the run directory is full ({first_line})",
            )
        else:
            kind, said = "exception", f"rank {child.rank} raised {first_line}"
        log = log or report.get("traceback", "").splitlines()[-20:]
        return run_status.cause(kind, said, rank=child.rank, exception=exception, log=log)

    def clean_up(self) -> None:
        """End whatever the run has started, and remove what only running processes need."""
        for child in self.children:
            if child.running:  # only if the watch itself has failed
                child.send(signal.SIGKILL)
        for pid in end_descendants():
            _say(f"process {pid} does not end on SIGKILL; it is left behind")
        self.meeting.remove()
        self._cap_logs()
        remove_unfinished(self.directory)


def supervise(order: dict[str, Any]) -> int:
    """Carry out one order to its terminal state; returns the exit code of the supervisor process."""
    directory = RunDirectory(Path(order["run"]))
    try:
        lock = liveness.hold(directory.alive)
    except (BlockingIOError, PermissionError):
        _say("this run has a supervisor already")
        return 1
    except OSError as error:
        _say(f"this file system has no locks, so readers judge this run by its processes: {error}")
        lock = None
    supervisor: Supervisor | None = None
    adopt_orphans()
    # Before anything else: from now on the run lives and dies with this process, whatever becomes of its launcher.
    known = run_status.update(directory, supervisor=identity(os.getpid()))
    if known.get("state") in TERMINAL:
        _say("the end of this run was written before it began")
        return 1
    try:
        os.chdir(order["cwd"])
        sys.path.append(order["cwd"])  # behind the libraries: a file there must not stand in for one of theirs
        os.environ.update(order.get("environment", {}))
        supervisor = Supervisor(directory, Experiment.of_run(directory), order, known, lock)
        supervisor.start()
        supervisor.note(
            state="running",
            started=time.time(),
            ranks=[{"rank": child.rank} | identity(child.pid) for child in supervisor.children],
        )
        # After the fork, so that it costs the first step nothing.
        supervisor._try(lambda: environment.record(directory, order["cwd"]))
        changes = supervisor.watch()
    except BaseException as error:
        traceback.print_exc()
        said = f"the supervisor failed: {type(error).__name__}: {message_of(error)}"
        changes = {"state": "failed", "cause": run_status.cause("supervisor", said)}
    known = known if supervisor is None else supervisor.known
    with _beating(lock):
        if supervisor is not None:
            supervisor.clean_up()
        try:
            summary.write(directory, changes["state"], order.get("baseline"))
        except Exception as error:
            # A full disk, or events that nobody can read: the state matters more than its summary.
            _say(f"no summary: {error!r}")
        _write_end(directory, known, changes)
    if lock is not None:
        lock.release(remove=True)
    return 0 if changes["state"] == "finished" else 1


def _write_end(directory: RunDirectory, known: dict[str, Any], changes: dict[str, Any]) -> None:
    """Write the terminal state; if its cause cannot be written, a plain one."""
    try:
        run_status.update(directory, known=known, **changes)
    except Exception as error:
        traceback.print_exc()
        if not directory.path.is_dir():
            return
        said = f"the run ended as {changes['state']}, but why cannot be written: {type(error).__name__}"
        cause = None if changes["state"] == "finished" else run_status.cause("supervisor", said)
        run_status.update(directory, known=known, state=changes["state"], cause=cause)


@contextmanager
def _beating(lock: liveness.Lock | None) -> Iterator[None]:
    """Show life meanwhile: a summary of a long run may take longer than readers wait. Nothing is forked any more."""
    ended = threading.Event()

    def beat() -> None:
        while lock is not None and not ended.wait(PROGRESS_EVERY_S):
            with suppress(OSError):
                lock.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _signature(directory: RunDirectory) -> tuple[int, int]:
    """What changes whenever the status is written."""
    try:
        info = os.stat(directory.status, follow_symlinks=False)
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(map(str, ranks))


def _say(text: str) -> None:
    try:
        print(f"labkit: {text}", file=sys.stderr, flush=True)  # noqa: T201  (the log of the supervisor)
    except OSError:
        pass
