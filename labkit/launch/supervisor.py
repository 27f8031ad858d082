"""The supervisor of one run: forks the ranks, watches them, ends the run in exactly one terminal state.

It holds the lock of the run as long as it lives. It has one thread and never waits for a rank without a time limit. It
reads `stop.json` and the heartbeat table, reaps ranks, identifies the rank at fault, and writes status, progress and
summary. Ranks die when it dies, and all processes that they have started end before it writes the terminal state.
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
from labkit.launch.board import HeartbeatTable
from labkit.launch.child import Child, fork_rank
from labkit.launch.descendants import OrphanReaper, end_descendants
from labkit.launch.stacks import main_thread, waits_for_others
from labkit.netem.hosts import Hosts
from labkit.runs import environment, liveness, logs, summary
from labkit.runs import status as run_status
from labkit.runs.leftovers import remove_unfinished
from labkit.runs.processes import adopt_orphans, identity

RANK_ENTRY = "labkit.training.worker:main"
"""Entry of a rank: named, not imported, because the supervisor and the ranks share only the experiment and files."""
POLL_S = 0.1
PROGRESS_EVERY_S = 0.5
SETTLE_S = 3.0
"""How long the other ranks may take to end by themselves after one has failed (s)."""
KILL_AFTER_S = 3.0
"""Time between SIGTERM and SIGKILL (s)."""
BLOCKING_S = 0.5
"""When the time to stop is over, the ranks without progress for this long (s) are checked for blocking the others."""
STACKS_S = 2.0
"""How long ranks may take to write their stacks (s); one that is stopped or floods its log never shows them."""
STACK_LINES = 60
"""Lines of the log kept for a stalled rank: the stacks of all its threads; the last one starts with where it hangs."""


class Supervisor:
    """Everything that one run needs while it is in progress."""

    def __init__(
        self,
        directory: RunDirectory,
        experiment: Experiment,
        order: dict[str, Any],
        last_status: dict[str, Any],
        lock: liveness.Lock | None,
    ) -> None:
        self.directory, self.experiment, self.order = directory, experiment, order
        self.last_status = last_status
        """The status as last written: the file may be damaged during the run."""
        self.written_signature: tuple[int, int] | None = None
        """Inode and modification time of the status as last written."""
        self.lock = lock
        self.orphan_reaper = OrphanReaper()
        self.heartbeats = HeartbeatTable(experiment.layout.world_size)
        self.started = time.monotonic()
        self.children: list[Child] = []
        self.stop: dict[str, Any] | None = None
        """Why the run is being stopped."""
        self.fault: dict[str, Any] | None = None
        """A failure that the supervisor detected itself, such as a stall, and the rank that caused it."""
        self.deadline: float | None = None
        """From this time on (monotonic seconds) ranks are ended by force."""
        self.blocking_ranks: list[int] = []
        """The ranks that the others were waiting for when the time to stop was over."""
        self.next_progress = 0.0
        self.rendezvous_folder = rendezvous.make_folder()

    def start(self) -> None:
        """Fork the ranks. Called in the only thread of this process: the parent-death signal is tied to it."""
        module, _, name = self.order.get("entry", RANK_ENTRY).partition(":")
        entry = getattr(import_module(module), name)
        network = self.experiment.launch.network
        hosts = None if network is None else Hosts(network, self.heartbeats.world_size)
        for rank in range(self.heartbeats.world_size):
            run = partial(
                entry,
                directory=self.directory,
                experiment=self.experiment,
                rank=rank,
                board=self.heartbeats,
                rendezvous=str(self.rendezvous_folder.path / "store"),
                requested=self.order["requested"],
                resume=self.order.get("resume"),
            )
            inherited = [child.pipe for child in self.children] + [self.rendezvous_folder.lock.descriptor]
            inherited += [self.lock.descriptor] if self.lock is not None else []
            self.children.append(
                fork_rank(rank, self.directory, self.experiment, run, inherited, self.rendezvous_folder.path, hosts)
            )
        if hosts is not None:
            hosts.close()

    def watch(self) -> dict[str, Any]:
        """Watch until all ranks have ended, and return the terminal changes of the status."""
        signals = {signal.SIGCHLD, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        while any(child.running for child in self.children):
            received = signal.sigtimedwait(signals, POLL_S)
            if received is not None and received.si_signo == signal.SIGTERM:
                self._begin_stop("stop", "the supervisor was asked to end (SIGTERM)")
            for child in self.children:
                if child.reap():
                    # The user's code may exit with a code of success in the middle of the training.
                    clean_exit_code = child.exit_code == 0 or (
                        child.exit_code == EXIT_STOPPED and self.stop is not None
                    )
                    done = self.heartbeats.rank_status(child.rank).phase == "done"
                    child.left_early = child.exit_code in (0, EXIT_STOPPED) and not (clean_exit_code and done)
                    if child.failed:
                        self._set_deadline(time.monotonic() + SETTLE_S)
            self._check_stop_request()
            self._check_directory()
            self._check_stalls()
            self._enforce_deadline()
            self._write_progress()
        return self._final_state()

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_stop_request(self) -> None:
        """Begin to stop if a stop was requested or the maximum duration has passed."""
        if self.stop is not None:
            return
        limit = self.experiment.launch.max_duration_s
        if self.directory.stop.exists():
            request = read_json(self.directory.stop)
            grace = request.get("grace_s") if isinstance(request, dict) else None
            self._begin_stop("stop", "stopped on request", grace)
        elif time.monotonic() - self.started > limit:
            self._begin_stop("duration", f"launch.max_duration_s of {limit:g} s has passed")

    def _check_directory(self) -> None:
        """End the run if its directory was removed, because it could be neither seen nor stopped any more."""
        if self.fault is None and not self.directory.path.is_dir():
            self.fault = run_status.cause("disk", f"the run directory {self.directory.path} was removed")
            self._set_deadline(time.monotonic())

    def _begin_stop(self, kind: str, message: str, grace: Any = None) -> None:
        """Request all ranks to stop within `grace` seconds (launch.grace_s if invalid); the first cause counts."""
        if self.stop is not None:
            return
        self.stop = run_status.cause(kind, message)
        # It was read from a file, so it may be anything, including NaN.
        valid = isinstance(grace, int | float) and 0 <= grace < 86400
        grace_s = float(grace) if valid else self.experiment.launch.grace_s
        self._set_deadline(time.monotonic() + grace_s)
        self.heartbeats.request_stop()
        self.update_status(state="stopping")

    def update_status(self, **changes: Any) -> None:
        """Change the status; if another process has written a terminal state, end the ranks so that the two agree."""

        def write() -> None:
            self.last_status = run_status.update(self.directory, fallback=self.last_status, **changes)
            self.written_signature = _signature(self.directory)

        self._attempt(write)
        if self.last_status.get("state") in TERMINAL:
            self.fault = self.fault or run_status.cause(
                "supervisor", "another process has written the terminal state of this run"
            )
            self._set_deadline(time.monotonic())

    def _check_status_file(self) -> None:
        """Repair the status if another process has changed it, which none should do; obey a terminal state."""
        written = self.written_signature
        if self.fault is None and written is not None and _signature(self.directory) != written:
            self.update_status()

    def _check_stalls(self) -> None:
        """End the run if ranks have stalled, with the rank that hangs and its stacks as the cause."""
        if self.deadline is not None:
            return
        limit = self.experiment.launch.timeout_s
        stalled = self.heartbeats.stalled_ranks(limit, [child.rank for child in self.children if child.running])
        if not stalled:
            return
        for child in self.children:  # each rank writes the stacks of its threads to its log
            if child.running:
                child.send(signal.SIGUSR1)
        stacks_deadline = time.monotonic() + STACKS_S
        while True:
            time.sleep(0.1)
            stacks = {rank: logs.tail(self.directory.log(rank), STACK_LINES) for rank in stalled}
            if all(map(main_thread, stacks.values())) or time.monotonic() > stacks_deadline:
                break
        # Of ranks at the same step and phase (e.g. all in the set-up), one hangs and the others wait for it.
        stalled = [rank for rank in stalled if not waits_for_others(stacks[rank])] or stalled
        rank_status = self.heartbeats.rank_status(stalled[0])
        silence = time.monotonic() - rank_status.progress
        self.fault = run_status.cause(
            "silent",
            f"{_ranks(stalled)} {'has' if len(stalled) == 1 else 'have'} been silent for {silence:.0f} s, "
            f"in {rank_status.phase} of step {rank_status.step} (launch.timeout_s is {limit:g})",
            rank=stalled[0],
            log=stacks[stalled[0]],
        )
        self._set_deadline(time.monotonic())

    def _set_deadline(self, deadline: float) -> None:
        """Move the deadline to `deadline` (monotonic seconds) if that is earlier."""
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)

    def _enforce_deadline(self) -> None:
        """Send SIGTERM to running ranks when the deadline has passed, and SIGKILL a little later."""
        now = time.monotonic()
        if self.deadline is None or now < self.deadline:
            return
        if all(child.terminated is None for child in self.children):
            running = [child.rank for child in self.children if child.running]
            self.blocking_ranks = self.heartbeats.stalled_ranks(BLOCKING_S, running)
        for child in self.children:
            if child.running and child.terminated is None:
                child.terminated = now
                child.send(signal.SIGTERM)
            elif child.running and child.terminated is not None and now - child.terminated > KILL_AFTER_S:
                child.send(signal.SIGKILL)

    def _write_progress(self) -> None:
        """Write progress.json, and do what else is due at the same interval."""
        now = time.monotonic()
        if now < self.next_progress:
            return
        self.next_progress = now + PROGRESS_EVERY_S
        self.orphan_reaper.reap({child.pid for child in self.children if child.running})
        if self.lock is not None:
            self._attempt(self.lock.beat)
        self._check_status_file()
        ranks = []
        for child in self.children:
            rank_status = self.heartbeats.rank_status(child.rank)
            ranks.append(
                {
                    "rank": child.rank,
                    "step": rank_status.step,
                    "phase": rank_status.phase if child.running else "done",
                    "silent_s": round(now - rank_status.progress, 2) if child.running else 0.0,
                    "memory_bytes": rank_status.memory_bytes,
                }
            )
        self._attempt(lambda: write_json(self.directory.progress, {"time": time.time(), "ranks": ranks}))
        self._cap_logs()

    def _cap_logs(self) -> None:
        """Limit the size of all logs of the run."""
        for path in (*(self.directory.log(child.rank) for child in self.children), self.directory.supervisor_log):
            self._attempt(partial(logs.cap, path))

    @staticmethod
    def _attempt(action: Callable[[], Any]) -> None:
        """Call `action` and log an OSError: a full disk must not end the watch, and the rank that fails reports it."""
        try:
            action()
        except OSError as error:
            _log(f"cannot write: {error}")

    # -- the end ------------------------------------------------------------------------------------------------------

    def _final_state(self) -> dict[str, Any]:
        """Return the terminal state, and its cause if it is not `finished`."""
        failure = self.fault or self._first_failure()
        if self.stop is None:
            return {"state": "failed" if failure else "finished", "cause": failure}
        if all(child.exit_code == 0 for child in self.children):
            return {"state": "finished", "cause": None}  # the request came after the last step
        killed = [child.rank for child in self.children if child.terminated is not None]
        if failure is not None and not killed:
            return {"state": "failed", "cause": failure}  # it failed by itself while it was stopping
        if killed:
            blocking = self.blocking_ranks or killed
            self.stop["message"] += f"; {_ranks(blocking)} did not end in time, so {_ranks(killed)} had to be killed"
            self.stop |= {"rank": blocking[0], "log": logs.tail(self.directory.log(blocking[0]))}
        return {"state": "stopped", "cause": self.stop}

    def _first_failure(self) -> dict[str, Any] | None:
        """Return the cause for the rank that failed first for its own reason; others merely lost their peer."""
        failed = [child for child in self.children if child.failed and child.terminated is None]
        if not failed:
            return None
        child = min(failed, key=lambda child: (child.lost_peer, child.ended))
        log = logs.tail(self.directory.log(child.rank))
        if child.signal is not None:
            name = signal.Signals(child.signal).name
            hint = "; the machine may have run out of memory" if child.signal == signal.SIGKILL else ""
            message = f"rank {child.rank} was killed by {name}{hint}"
            return run_status.cause("signal", message, rank=child.rank, signal=name, log=log)
        report = child.report or {"type": "SystemExit", "message": f"exit code {child.exit_code}"}
        if report.get("task"):  # an error of the task: one sentence without a stack, which is in the log
            return run_status.cause("task", str(report["task"]), rank=child.rank)
        exception = f"{report['type']}: {report['message']}".removesuffix(": ")
        first_line = exception.splitlines()[0][:500]
        if child.left_early or child.report is None:
            early = self.heartbeats.rank_status(child.rank).phase != "done"
            qualifier = " before it was done" if early else ""
            if child.left_early and not early:
                qualifier = ", which means that it was asked to stop; nobody asked it"
            detail = f" ({first_line})" if child.report else ""
            kind, message = "exception", f"rank {child.rank} left with exit code {child.exit_code}{qualifier}{detail}"
        elif report.get("disk_full"):
            kind, message = (
                "disk",
                f"rank {child.rank} cannot write: the disk under the run directory is full ({first_line})",
            )
        else:
            kind, message = "exception", f"rank {child.rank} raised {first_line}"
        log = log or report.get("traceback", "").splitlines()[-20:]
        return run_status.cause(kind, message, rank=child.rank, exception=exception, log=log)

    def clean_up(self) -> None:
        """End every process that the run has started, and remove what only running processes need."""
        for child in self.children:
            if child.running:  # only if `watch` itself has failed
                child.send(signal.SIGKILL)
        for pid in end_descendants():
            _log(f"process {pid} does not end on SIGKILL; it is left behind")
        self.rendezvous_folder.remove()
        self._cap_logs()
        remove_unfinished(self.directory)


def supervise(order: dict[str, Any]) -> int:
    """Execute one order up to its terminal state and return the exit code of the supervisor process."""
    directory = RunDirectory(Path(order["run"]))
    try:
        lock = liveness.hold(directory.alive)
    except (BlockingIOError, PermissionError):
        _log("this run has a supervisor already")
        return 1
    except OSError as error:
        _log(f"this file system has no locks, so the state of this run is judged by its processes: {error}")
        lock = None
    supervisor: Supervisor | None = None
    adopt_orphans()
    # First of all: from now on the run depends on this process alone, even if its launcher ends.
    last_status = run_status.update(directory, supervisor=identity(os.getpid()))
    if last_status.get("state") in TERMINAL:
        _log("the terminal state of this run was written before it began")
        return 1
    try:
        os.chdir(order["cwd"])
        sys.path.append(order["cwd"])  # last: a file there must not shadow a library
        os.environ.update(order.get("environment", {}))
        supervisor = Supervisor(directory, Experiment.of_run(directory), order, last_status, lock)
        supervisor.start()
        supervisor.update_status(
            state="running",
            started=time.time(),
            ranks=[{"rank": child.rank} | identity(child.pid) for child in supervisor.children],
        )
        # After the fork, so that it does not delay the first step.
        supervisor._attempt(lambda: environment.record(directory, order["cwd"]))
        changes = supervisor.watch()
    except BaseException as error:
        traceback.print_exc()
        message = f"the supervisor failed: {type(error).__name__}: {message_of(error)}"
        changes = {"state": "failed", "cause": run_status.cause("supervisor", message)}
    last_status = last_status if supervisor is None else supervisor.last_status
    with _keep_beating(lock):
        if supervisor is not None:
            supervisor.clean_up()
        try:
            summary.write(directory, changes["state"], order.get("baseline"))
        except Exception as error:
            # The disk is full, or the events are unreadable: the state is more important than its summary.
            _log(f"no summary: {error!r}")
        _write_terminal_state(directory, last_status, changes)
    if lock is not None:
        lock.release(remove=True)
    return 0 if changes["state"] == "finished" else 1


def _write_terminal_state(directory: RunDirectory, last_status: dict[str, Any], changes: dict[str, Any]) -> None:
    """Write the terminal state; if that fails, write it with a generic cause."""
    try:
        run_status.update(directory, fallback=last_status, **changes)
    except Exception as error:
        traceback.print_exc()
        if not directory.path.is_dir():
            return
        message = f"the run ended as {changes['state']}, but why cannot be written: {type(error).__name__}"
        cause = None if changes["state"] == "finished" else run_status.cause("supervisor", message)
        run_status.update(directory, fallback=last_status, state=changes["state"], cause=cause)


@contextmanager
def _keep_beating(lock: liveness.Lock | None) -> Iterator[None]:
    """Keep the lock's heartbeat going: the summary of a long run may take longer than readers wait.

    It uses a thread, so nothing may be forked in this context.
    """
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
    """Return inode and modification time of the status, which change whenever it is written."""
    try:
        info = os.stat(directory.status, follow_symlinks=False)
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _ranks(ranks: list[int]) -> str:
    """Return the ranks as words, e.g. "ranks 0 and 1"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(map(str, ranks))


def _log(text: str) -> None:
    """Print a line to the log of the supervisor, if it can be written."""
    try:
        print(f"labkit: {text}", file=sys.stderr, flush=True)  # noqa: T201  (the log of the supervisor)
    except OSError:
        pass
