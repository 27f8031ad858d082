"""A run whose disk fills up; to be run in a mount namespace of its own. Exits 77 if it cannot mount."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from labkit.launch import client
from labkit.runs import Run
from tests.launch.helpers import ENDLESS, Watched, start, steps_written, tiny


def main() -> int:
    """Mount, run, fill, look."""
    disk = Path(sys.argv[1])
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        print(mounted.stderr.strip())
        return 77
    os.environ["LABKIT_HOME"] = str(disk / "home")
    a_full_disk_ends_a_run(disk)
    a_stop_gets_through(disk)
    client.close()
    print("all proved")
    return 0


def a_full_disk_ends_a_run(disk: Path) -> None:
    """A run that writes is ended by the full disk, whole lines and a readable end stay."""
    run = start(tiny(steps=ENDLESS, training__checkpoint_every=None))
    with Watched(run) as watch:
        watch.begun()
        fill(disk / "ballast")
        written = [steps_written(run, rank) for rank in (0, 1)]
        cause = watch.ends("failed", within=10, kind="disk")
        assert "disk under the run directory is full" in cause["message"], cause
        assert cause["rank"] in (0, 1)
    assert [steps_written(run, rank) >= written[rank] for rank in (0, 1)] == [True, True]
    assert Run.attach(run.id).summary()["steps"] > 0, "a summary can still be made"
    (disk / "ballast").unlink()


def a_stop_gets_through(disk: Path) -> None:
    """Stop is written into the space that was set aside, and the end of the run after it (F31)."""
    os.environ["LABKIT_TEST_PAUSE"] = "0.3"  # ranks that write seldom do not run into the full disk before the stop
    task = {"name": "custom", "path": f"{Path(__file__).parent / 'paced.py'}:make_task"}
    run = start(tiny(workload=task, steps=ENDLESS))
    with Watched(run) as watch:
        watch.begun(1)
        fill(disk / "ballast")
        run.request_stop()
        assert json.loads(run.directory.stop.read_text())["requested"] > 0
        run.wait(15)
    assert run.state == "stopped" or (run.state, run.cause["kind"]) == ("failed", "disk"), run.cause


def fill(path: Path) -> None:
    """Take every free block."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


if __name__ == "__main__":
    sys.exit(main())
