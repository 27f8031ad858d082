"""Commands that launch runs: run, sweep and validate."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from labkit.cli.output import UsageError, check_output, print_json, print_line, print_lines, progress, say
from labkit.cli.parser import Commands, add_experiment
from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.assignment import parse_assignment
from labkit.experiment.recipes import recipe
from labkit.experiment.safe_files import printable


def add_to(commands: Commands) -> None:
    """Add the commands of this file and their arguments."""
    parser = commands.add("run", run, "Launch a run and follow it to its end.")
    add_experiment(parser)
    parser.add_argument("--resume", metavar="RUN", help="resume from the last checkpoint of this run")
    parser.add_argument(
        "--trust", action="store_true", help="run the code stored in a run given by path or owned by somebody else"
    )
    parser.add_argument(
        "--baseline",
        default="auto",
        metavar="auto|none|measure|RUN",
        help="what the speed-up refers to: the latest comparable one-process run, nothing, one run first, or this run",
    )
    parser.add_argument("--detach", action="store_true", help="print the run's id and leave it running")
    parser = commands.add(
        "sweep", sweep, "Run every combination of some values; the same command resumes where it stopped."
    )
    add_experiment(parser)
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="FIELD=[VALUE,…]",
        help='values to combine, as JSON: \'quantization.training=["fp32","bf16"]\'',
    )
    parser.add_argument("--name", required=True, metavar="NAME", help="name under which the sweep is kept and resumed")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="write a report with the Pareto front")
    parser = commands.add("validate", validate, "Tell whether an experiment can run here, and why not.")
    add_experiment(parser)
    parser.add_argument(
        "--rehearse", action="store_true", help="also build and try the task on all ranks: one minute at most"
    )


def requested_experiment(options: argparse.Namespace, default: Experiment | None = None) -> Experiment:
    """Return the experiment that the arguments ask for; raise ExperimentError with every reason why there is none."""
    what = options.what
    if what is None:
        experiment = default or recipe("vision-ddp")
    elif what.endswith(".json") or "/" in what:
        experiment = Experiment.load(what)
    else:
        experiment = recipe(what)
    experiment = experiment.replace(*options.set)
    return experiment.resolve(world_size=options.ranks) if options.ranks else experiment


def run(options: argparse.Namespace) -> int:
    """Launch a run and follow it."""
    from labkit.runs.interrupts import as_interrupts

    with as_interrupts():  # a job that timed out and a closed terminal act as Ctrl-C does
        return _launch_and_follow(options)


def _launch_and_follow(options: argparse.Namespace) -> int:
    from labkit.experiment.one_process import one_process
    from labkit.launch import launch
    from labkit.runs import Run
    from labkit.runs.compare import named_baseline
    from labkit.runs.follow import follow

    resumed = Run.attach(options.resume) if options.resume else None
    if resumed and not resumed.checkpoints():
        raise UsageError(f"run {resumed.id} has no checkpoint to resume from")
    experiment = requested_experiment(options, resumed.experiment if resumed else None)
    if resumed and options.what is None and not options.trust:
        _insist_on_trust(resumed, options)
    experiment = experiment.check()
    baseline = {"none": None, "auto": "auto", "measure": None}.get(options.baseline, options.baseline)
    if options.baseline == "measure" and experiment.layout.world_size > 1:
        base = launch(one_process(experiment, f"baseline: {experiment.title}"), baseline=None)
        if follow(base, quiet=options.json).state != "finished":
            return _end(base, options)
        baseline = base.id
    elif baseline not in (None, "auto"):
        named_baseline(baseline)
    for warning in experiment.warnings():
        say(str(warning))
    run = launch(experiment, resume=resumed, baseline=baseline)
    options.launched = True
    if options.detach:
        print_json({"run_id": run.id}) if options.json else print_line(run.id)
        return 0
    return _end(follow(run, quiet=options.json), options)


def _insist_on_trust(run: Any, options: argparse.Namespace) -> None:
    """Ask before running code from a run directory that may be anybody's; refuse where nobody can answer."""
    from labkit.experiment.resume import carried_code

    code = carried_code(run.experiment)
    own = os.sep not in options.resume and os.lstat(run.directory.experiment).st_uid == os.getuid()
    if not code or own:
        return
    whose = f"run {run.id} executes {code}"
    if not sys.stdin.isatty() or options.json:
        raise UsageError(f"{whose}; look at it (labkit show), then pass --trust to run it")
    print(f"labkit: {printable(whose)}. Run it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was launched")


def _end(run: Any, options: argparse.Namespace) -> int:
    """Print how a run ended and return its exit code."""
    from labkit.runs.follow import summary_text

    summary, cause = run.summary(), run.cause
    if cause:
        say(f"{run.state}: {cause['message']}")
        if run.state == "failed":
            for line in cause.get("log", [])[-8:]:
                progress(f"  {line}")
    if options.json:
        print_json(summary | {"status": run.state, "cause": cause})
    else:
        print_lines(summary_text(summary))
    return 0 if run.state in ("finished", "stopped") else 1


def sweep(options: argparse.Namespace) -> int:
    """Run or resume a sweep."""
    from labkit.launch.sweep import sweep as make_sweep
    from labkit.runs.checked import NOT_FINITE

    over = {}
    for field, values in map(parse_assignment, options.over):
        if not isinstance(values, list) or not values:
            raise UsageError(f"--over takes a list, as in --over '{field}=[1,2]'")
        over[field] = values
    check_output(options)
    try:
        queue = make_sweep(requested_experiment(options), over, options.name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    reported: set[str] = set()

    def report_finished(queue: Any) -> None:
        for number, point in enumerate(queue.points, 1):
            if point.done and point.label not in reported:
                reported.add(point.label)
                line = f"{number} of {len(queue.points)}: {point.label}: {point.state} {point.reason}"
                say(line.rstrip())

    try:
        queue.run(report_finished)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if queue.problem:
        say(queue.problem)
    rows, runs = queue.table(), queue.runs
    if options.output and runs:
        from labkit.plots.report import report

        report(runs, options.output)
    if options.json:
        print_json({"name": options.name, "points": rows})
    else:
        for row in rows:
            figures = [f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)]
            figures += [f"{name} {value}" for name, value in row.items() if value == NOT_FINITE]
            print_lines(f"{row['point']}: {row['state']} {row['run']} {', '.join(figures)} {row['reason']}".rstrip())
    return 0 if all(point.state in ("finished", "refused") for point in queue.points) else 1


def validate(options: argparse.Namespace) -> int:
    """Check an experiment by the rules, and with --rehearse by trying its task."""
    experiment = requested_experiment(options)
    problems, warnings = experiment.problems(), experiment.warnings()
    if options.rehearse and not problems:
        from labkit.launch.rehearse import rehearse

        problem = rehearse(experiment)
        problems = problems if problem is None else [problem]
    if options.json:
        described = [{"field": p.field, "reason": p.reason, "nearest": p.nearest} for p in problems]
        print_json({"valid": not problems, "problems": described, "warnings": [str(w) for w in warnings]})
    for warning in warnings:
        say(str(warning))
    if problems:
        raise ExperimentError(problems)
    if not options.json:
        print_line(f"This can run here. {experiment.resolve()}.")
    return 0
