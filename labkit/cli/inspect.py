"""Commands that look at experiments, runs and the machine, from `recipes` to `doctor`."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import asdict
from pathlib import Path

from labkit.cli.output import UsageError, print_json, print_line, print_lines, say
from labkit.cli.parser import Commands, seconds
from labkit.cli.reference import settings_page
from labkit.experiment import ExperimentError, Problem
from labkit.experiment.recipes import RECIPES
from labkit.experiment.run_directory import TERMINAL
from labkit.experiment.safe_files import printable


def add_to(commands: Commands) -> None:
    """Add the commands of this file and their arguments."""
    commands.add("recipes", recipes, "List the ready-made experiments.")
    parser = commands.add("fields", fields, "List every field that --set takes.")
    parser.add_argument("--results", action="store_true", help="the keys of summaries, comparisons and events instead")
    parser.add_argument("--markdown", action="store_true", help="as the reference page of the documentation")
    parser = commands.add("runs", runs, "List the runs.")
    parser.add_argument("--all", action="store_true", help="all of them, not only the latest 20")
    parser = commands.add("show", show, "Show one run: state, cause, summary, last log lines.")
    parser.add_argument("run", metavar="RUN", nargs="?", default="last", help="run id, path, or last (default)")
    parser = commands.add("stop", stop, "Stop a run: finish the step, write a checkpoint, end.")
    parser.add_argument("run", metavar="RUN", nargs="?", help="run id, path, or last")
    parser.add_argument("--all", action="store_true", help="every run that has not ended yet")
    parser.add_argument("--grace", type=seconds, metavar="S", help="seconds before ranks are ended by force")
    parser = commands.add("compare", compare, "Compare runs: speed-up over a named baseline, efficiency, ceiling.")
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run ids or paths")
    parser.add_argument("--all", action="store_true", help="all finished runs")
    parser.add_argument("--baseline", metavar="RUN", help="the run that speed-ups refer to")
    parser = commands.add("report", report, "Write an HTML report of one or several runs that opens without a kernel.")
    parser.add_argument("runs", metavar="RUN", nargs="*", default=["last"], help="run ids or paths (default: last)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to write it (default: report.html in the last run)"
    )
    commands.add("doctor", doctor, "Show what this machine offers, and what is unavailable here and why.")


def recipes(options: argparse.Namespace) -> int:
    """List the ready-made experiments."""
    if options.json:
        print_json({name: make().to_dict() for name, make in RECIPES.items()})
    for name, make in RECIPES.items() if not options.json else ():
        print_line(f"{name:24} {(make.__doc__ or '').strip()}")
    return 0


def fields(options: argparse.Namespace) -> int:
    """List every setting of an experiment, or every key of its results."""
    from labkit.experiment.fields import fields as all_fields

    if options.results:
        return _result_fields(options)
    described = all_fields()
    if options.markdown:
        print_lines(settings_page(described))
    if options.json:
        print_json([field.to_dict() for field in described])
    for field in described if not options.json and not options.markdown else ():
        print_line(f"{field.name:36} {field.kind:24} {field.description}")
    return 0


def _result_fields(options: argparse.Namespace) -> int:
    from labkit.cli.results_reference import result_fields, results_page

    described = result_fields()
    if options.markdown:
        print_lines(results_page(described))
    if options.json:
        print_json([asdict(field) for field in described])
    for field in described if not options.json and not options.markdown else ():
        print_line(f"{field.table:20} {field.name:30} {field.kind:24} {field.description}")
    return 0


def runs(options: argparse.Namespace) -> int:
    """List the runs."""
    from labkit.runs import Run

    every = Run.all()
    rows = [run.status for run in (every if options.all else every[-20:])]
    if options.json:
        print_json(rows)
    elif not rows:
        print_line("There is no run yet. Start one with: labkit run vision-ddp")
    else:
        for row in rows:
            print_line(f"{printable(row['run_id']):40} {row['state']:9} {row.get('layout') or '':10} {row['title']}")
    return 0


def show(options: argparse.Namespace) -> int:
    """Show one run."""
    from labkit.experiment.resume import carried_code
    from labkit.runs import Run
    from labkit.runs.follow import summary_text

    run = Run.attach(options.run)
    status, summary = run.status, run.summary()
    if options.json:
        experiment = run.experiment
        described = {"status": status, "summary": summary, "experiment": experiment.to_dict()}
        print_json(described | {"code": carried_code(experiment) or None})
        return 0
    print_line(f"{run.id}: {status['state']}  {status['title']}")
    print_line(f"directory {run.directory.path}")
    with contextlib.suppress(ExperimentError):
        if code := carried_code(run.experiment):
            print_line(f"code: this run executes {code}")
    if status.get("cause"):
        print_line(f"cause: {status['cause']['message']}")
    print_lines(summary_text(summary))
    log = run.logs(0, 10)
    if log:
        print_line("")
        print_line("last lines of rank 0:")
        print_lines(log)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Stop one run or all."""
    from labkit.runs import Run

    if bool(options.run) == options.all:
        raise UsageError("name one run, or pass --all")
    chosen = [run for run in Run.all() if not run.done] if options.all else [Run.attach(options.run)]
    for run in chosen:
        run.request_stop(options.grace)
    states = {run.id: run.stop(options.grace).state for run in chosen}
    if options.json:
        print_json(states)
    for name, state in states.items() if not options.json else ():
        print_line(f"{name}: {state}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compare runs."""
    from labkit.runs import Run
    from labkit.runs import compare as compare_runs
    from labkit.runs.checked import figure_or_words

    if bool(options.runs) == options.all:
        raise UsageError("name the runs to compare, or pass --all")
    every = [run for run in Run.all() if run.state in TERMINAL] if options.all else []
    chosen = every or [Run.attach(name) for name in options.runs]
    if not chosen:
        raise ExperimentError([Problem("", "there is no run to compare yet")])
    comparison = compare_runs(chosen, options.baseline, skip_unreadable=options.all)
    for reason in comparison.left_out:
        say(f"left out: {reason}")
    if options.json:
        named = {"baseline_run_id": comparison.baseline_run_id, "left_out": comparison.left_out}
        rows = [figure_or_words(row.as_dict()) for row in comparison.rows]
        print_json(named | {"rows": rows, "text": comparison.text()})
    else:
        print_lines(str(comparison))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write an HTML report."""
    from labkit.runs import Run

    try:
        from labkit.plots.report import report as write_report
    except ModuleNotFoundError as error:
        raise UsageError(f"the report needs {error.name}: pip install 'labkit[lab]'") from None
    path = write_report([Run.attach(name) for name in options.runs], options.output)
    print_json({"report": str(path)}) if options.json else print_line(str(path))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Show what this machine offers."""
    from labkit.launch.doctor import as_dict, examine

    findings = examine()
    if options.json:
        print_json(as_dict(findings))
    for finding in findings if not options.json else ():
        mark = {True: "ok", False: "!!", None: "--"}[finding.fine]
        print_line(f"{mark}  {finding.topic:22} {finding.text}")
    return 0 if all(finding.fine is not False for finding in findings) else 1
