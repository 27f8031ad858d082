"""The command `labkit profile`: the step that torch.profiler recorded, its files, and what took most of its time."""

from __future__ import annotations

import argparse

from labkit.cli.output import UsageError, print_json, print_line
from labkit.cli.parser import Commands
from labkit.experiment.safe_files import printable


def add_to(commands: Commands) -> None:
    """Add the command of this file and its argument."""
    parser = commands.add("profile", profile, "Show the profiled step of a run: its files and the longest operations.")
    parser.add_argument("run", metavar="RUN", nargs="?", default="last", help="run id, path, or last (default)")


def profile(options: argparse.Namespace) -> int:
    """Show where the profiles of a run are, how to open them, and the operations that took most time."""
    from labkit.runs import Run
    from labkit.runs.profile import HOW_TO_OPEN, profile_text

    run = Run.attach(options.run)
    recorded = run.profile()
    if not recorded.paths and not recorded.notes:
        raise UsageError(f"run {printable(run.id)} has no profile: set training.profile_step to a step of the run")
    if options.json:
        paths, rows = [str(path) for path in recorded.paths], [row.as_dict() for row in recorded.rows]
        files = {"run_id": run.id, "step": recorded.step, "files": paths, "how_to_open": HOW_TO_OPEN}
        print_json(files | {"rows": rows, "notes": recorded.notes})
    for line in profile_text(recorded) if not options.json else ():
        print_line(line)
    return 0 if recorded.paths else 1
