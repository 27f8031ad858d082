"""The command line: the same for people, tests and CI.

Exit code 0: good. 1: the run failed, or the claim does not hold. 2: the request is wrong; the reason is one sentence
on standard error and nothing was launched. With --json the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from labkit import __version__
from labkit.experiment import Experiment, ExperimentError, Problem, safe_files
from labkit.experiment.recipes import RECIPES, recipe
from labkit.experiment.run_directory import TERMINAL
from labkit.experiment.safe_files import printable as _plain
from labkit.experiment.schema import parse_assignment

Command = Callable[[argparse.Namespace], int]


class UsageError(Exception):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class OutputError(Exception):
    """What was to be printed could not be, e.g. on a full disk."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # A name in a lesser alphabet than UTF-8, or half of a character pair, is printed as its escape.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = argparse.Namespace(launched=False)
    try:
        _parser().parse_args(arguments, options)
        options.words = list(sys.argv[1:] if arguments is None else arguments)
        command: Command = options.command
        code = command(options)
        _flush()
        return code
    except UsageError as error:
        return _refuse(str(error))
    except ExperimentError as error:
        return _refuse(*map(str, error.problems))
    except BrokenPipeError:
        _give_up_output()  # the reader of our output has gone (labkit … | head)
        return 0
    except OutputError as error:
        _give_up_output()
        _say(f"cannot write the output: {error}")
        return 1
    except TimeoutError as error:
        _say(str(error))
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        reason = str(error) if error.errno is None else f"{where}{error.strerror}"
        if not options.launched:
            return _refuse(reason)
        _say(f"{reason} (the run was launched)")
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _flush() -> None:
    """Bring what was printed to its place; OutputError where that does not take it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from None


def _give_up_output() -> None:
    """Nothing more can be written to standard output; what is left in its buffer must not fail again at the end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass


def _say(sentence: str) -> None:
    """One sentence on standard error."""
    stop = "" if sentence.endswith((".", ")")) else "."
    try:
        print(f"labkit: {_plain(sentence)}{stop}", file=sys.stderr, flush=True)
    except OSError:
        pass  # there is nobody left to tell


def _tell(line: str) -> None:
    """One line about what is going on, on standard error."""
    print(_plain(line), file=sys.stderr)


def _refuse(*sentences: str) -> int:
    for sentence in sentences:
        _say(sentence)
    return 2


def _print(text: str) -> None:
    """One line on standard output, whatever a name or a file has in it."""
    try:
        print(_plain(text))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="labkit", description="A laboratory for parallel training of neural networks.")
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str, json_too: bool = True) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if json_too:
            sub.add_argument("--json", action="store_true", help="print JSON in the last line of standard output")
        return sub

    def add_experiment(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("what", nargs="?", metavar="RECIPE|FILE.json", help="what to run (default: vision-ddp)")
        sub.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field: layout.dp_replicate=2"
        )
        sub.add_argument("--ranks", type=_count, metavar="N", help="number of ranks: fills the axis that is -1")

    run = add("run", _run, "Launch a run and follow it to its end.")
    add_experiment(run)
    run.add_argument("--resume", metavar="RUN", help="go on from the last checkpoint of this run")
    run.add_argument(
        "--trust", action="store_true", help="run the code that a run given by path, or somebody else's, carries"
    )
    run.add_argument(
        "--baseline",
        default="auto",
        metavar="auto|none|measure|RUN",
        help="what the speed-up refers to: the latest fitting one-process run, nothing, one made first, or this run",
    )
    run.add_argument("--detach", action="store_true", help="print the run's id and leave it running")
    check = add("check", _check, "Prove that a layout computes what one process computes.")
    add_experiment(check)
    check.add_argument("--steps", type=_count, help="updates to compare (default: 20)")
    check.add_argument(
        "--precision", choices=["both", "fp64", "fp32"], default="both", help="number formats to prove (default: both)"
    )
    check.add_argument(
        "--matrix",
        nargs="?",
        const="all",
        choices=["all", "sample"],
        help="prove all layouts of small models: every product of axes up to 8 (--ranks) ranks, all pairs of options",
    )
    check.add_argument("--workload", action="append", metavar="NAME", help="only these models of the matrix")
    check.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the matrix as a table in Markdown")
    check.add_argument(
        "--go-on", type=Path, metavar="FILE.jsonl", help="keep what the matrix finds there, and run only what is left"
    )
    combined = add(
        "combinations", _combinations, "Run every pair of methods that may meet: each has to learn, or is refused."
    )
    combined.add_argument(
        "--with",
        action="append",
        default=[],
        dest="names",
        metavar="NAME",
        help="only those with this method or layout",
    )
    combined.add_argument("--ranks", type=_count, metavar="N", help="only those with at most so many ranks")
    combined.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the table in Markdown")
    methods = add("methods", _methods, "Measure what every way to combine gradients learns and sends, at its defaults.")
    methods.add_argument("recipes", nargs="*", metavar="RECIPE", help="what is trained (default: vision-ddp)")
    methods.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of all runs")
    methods.add_argument("--ranks", type=_counts, default=[2], metavar="N[,N…]", help="numbers of ranks (default: 2)")
    methods.add_argument("--method", action="append", default=[], metavar="NAME", help="only these methods")
    methods.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the table in Markdown")
    sweep = add("sweep", _sweep, "Run every combination of some values; the same command goes on where it stopped.")
    add_experiment(sweep)
    sweep.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="FIELD=[VALUE,…]",
        help='values to combine, as JSON: \'quantization.training=["fp32","bf16"]\'',
    )
    sweep.add_argument("--name", required=True, metavar="NAME", help="under which it is kept and gone on with")
    sweep.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="write a report with the Pareto front")
    validate = add("validate", _validate, "Say whether an experiment can run here, and why not.")
    add_experiment(validate)
    validate.add_argument(
        "--rehearse", action="store_true", help="build the task on all ranks and try it too: one minute at most"
    )
    add("recipes", _recipes, "List the ready-made experiments.")
    add("fields", _fields, "List every field that --set takes.")
    runs = add("runs", _runs, "List the runs.")
    runs.add_argument("--all", action="store_true", help="all of them, not only the latest 20")
    show = add("show", _show, "Show one run: state, cause, summary, last log lines.")
    show.add_argument("run", metavar="RUN", nargs="?", default="last", help="run id, path, or last (default)")
    stop = add("stop", _stop, "Stop a run: finish the step, write a checkpoint, end.")
    stop.add_argument("run", metavar="RUN", nargs="?", help="run id, path, or last")
    stop.add_argument("--all", action="store_true", help="every run that is still going on")
    stop.add_argument("--grace", type=_seconds, metavar="S", help="seconds before ranks are ended by force")
    compare = add("compare", _compare, "Compare runs: speed-up over a named baseline, efficiency, ceiling.")
    compare.add_argument("runs", metavar="RUN", nargs="*", help="run ids or paths")
    compare.add_argument("--all", action="store_true", help="all finished runs")
    compare.add_argument("--baseline", metavar="RUN", help="the run that speed-ups refer to")
    report = add("report", _report, "Write an HTML report of one or several runs that opens without a kernel.")
    report.add_argument("runs", metavar="RUN", nargs="*", default=["last"], help="run ids or paths (default: last)")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to (default: report.html in the last run)"
    )
    add("doctor", _doctor, "Show what this machine has, and what is greyed out and why.")
    return parser


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 86400:
        raise argparse.ArgumentTypeError(f"must be seconds between 0 and 86400, got {text!r}")
    return number


def _experiment(options: argparse.Namespace, default: Experiment | None = None) -> Experiment:
    """The experiment that the arguments ask for; ExperimentError with every reason why there is none."""
    what = options.what
    if what is None:
        experiment = default or recipe("vision-ddp")
    elif what.endswith(".json") or "/" in what:
        experiment = Experiment.load(what)
    else:
        experiment = recipe(what)
    experiment = experiment.replace(*options.set)
    return experiment.resolve(world_size=options.ranks) if options.ranks else experiment


def _print_lines(text: str) -> None:
    for line in text.splitlines():
        _print(line)


def _print_json(data: Any) -> None:
    _print(safe_files.to_json(data))
    _flush()


def _check_output(options: argparse.Namespace) -> None:
    """Before anything is launched: can the table be written where it is wanted?"""
    if options.output and not options.output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {options.output.parent} to write to")


def _as_typed(options: argparse.Namespace) -> str:
    """The command by which a table can be made again."""
    return "labkit " + shlex.join(word for word in options.words if word != "--json")


def _deliver(options: argparse.Namespace, table: str, data: Any) -> None:
    """A table in Markdown, to its file or the terminal, and the JSON if it was asked for."""
    if options.output:
        options.output.write_text(table, encoding="utf-8", errors="backslashreplace")
    else:
        _print_lines(table)
    if options.json:
        _print_json(data)


# -- commands ---------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from labkit.runs.interrupts import as_interrupts

    with as_interrupts():  # a job that is timed out, a terminal that is closed: as Ctrl-C
        return _launch_and_follow(options)


def _launch_and_follow(options: argparse.Namespace) -> int:
    from labkit.experiment.one_process import one_process
    from labkit.launch import launch
    from labkit.runs import Run
    from labkit.runs.compare import named_baseline
    from labkit.runs.follow import follow

    resumed = Run.attach(options.resume) if options.resume else None
    if resumed and not resumed.checkpoints():
        raise UsageError(f"run {resumed.id} has no checkpoint to go on from")
    experiment = _experiment(options, resumed.experiment if resumed else None)
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
        _say(str(warning))
    run = launch(experiment, resume=resumed, baseline=baseline)
    options.launched = True
    if options.detach:
        _print_json({"run_id": run.id}) if options.json else _print(run.id)
        return 0
    return _end(follow(run, quiet=options.json), options)


def _insist_on_trust(run: Any, options: argparse.Namespace) -> None:
    """Before code from a run directory that may be anybody's is executed: ask, or refuse where nobody can answer."""
    from labkit.experiment.resume import carried_code

    code = carried_code(run.experiment)
    own = os.sep not in options.resume and os.lstat(run.directory.experiment).st_uid == os.getuid()
    if not code or own:
        return
    whose = f"run {run.id} executes {code}"
    if not sys.stdin.isatty() or options.json:
        raise UsageError(f"{whose}; look at it (labkit show), then say --trust if you want that")
    print(f"labkit: {_plain(whose)}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was launched")


def _end(run: Any, options: argparse.Namespace) -> int:
    from labkit.runs.follow import summary_text

    summary, cause = run.summary(), run.cause
    if cause:
        _say(f"{run.state}: {cause['message']}")
        if run.state == "failed":
            for line in cause.get("log", [])[-8:]:
                _tell(f"  {line}")
    if options.json:
        _print_json(summary | {"status": run.state, "cause": cause})
    else:
        _print_lines(summary_text(summary))
    return 0 if run.state in ("finished", "stopped") else 1


def _check(options: argparse.Namespace) -> int:
    from labkit.proofs.parity import STEPS, check
    from labkit.runs import RunFailed

    precisions = ("fp64", "fp32") if options.precision == "both" else (options.precision,)
    if options.matrix:
        return _check_matrix(options, precisions)
    if options.workload or options.output:
        raise UsageError("--workload and -o belong to --matrix")
    experiment = _experiment(options)
    experiment.check()
    try:
        result = check(
            experiment, options.steps or STEPS, precisions, lambda text: print(_plain(text), file=sys.stderr)
        )
    except RunFailed as error:
        _say(f"the check could not be made: {error}")
        return 1
    for line in result["text"]:
        _print(line)
    if options.json:
        _print_json(result)
    return 0 if result["parity"] else 1


def _check_matrix(options: argparse.Namespace, precisions: Sequence[str]) -> int:
    from labkit.proofs import matrix
    from labkit.proofs.cases import FAMILIES
    from labkit.proofs.matrix_follow import follow
    from labkit.proofs.matrix_log import MatrixLog

    if options.what or options.steps:
        raise UsageError("--matrix makes its own experiments: it takes no recipe and no --steps")
    families = options.workload or list(FAMILIES)
    if unknown := [name for name in families if name not in FAMILIES]:
        raise UsageError(f"the matrix has no workload {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    _check_output(options)
    changes = dict(parse_assignment(text) for text in options.set)
    cases = matrix.cases(families, options.ranks or 8, precisions, changes)
    if options.matrix == "sample":
        cases = matrix.sample(cases)
    try:
        log = MatrixLog(options.go_on) if options.go_on else None
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    results: list[matrix.Result] = []
    try:
        follow(cases, results, quiet=options.json, log=log)
    finally:  # also what was known when it was interrupted
        counts = matrix.counts(results)
        seconds = sum(result.seconds for result in results)
        table = matrix.markdown(results, len(cases), _as_typed(options), seconds)
        known = {"asked": len(cases)} | counts | {"cases": [result.to_dict() for result in results]}
        _deliver(options, table, known)
    return 0 if counts["equal"] + counts["refused"] == len(cases) else 1


def _combinations(options: argparse.Namespace) -> int:
    from labkit.launch import warm
    from labkit.proofs import combinations

    try:
        wanted = [combinations.named(text) for text in options.names]
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_output(options)
    cases = combinations.holding(combinations.cases(), wanted, options.ranks)
    results: list[combinations.Result] = []
    begun = time.monotonic()
    warm()
    try:
        for one in combinations.run(cases):
            results.append(one)
            if one.outcome != "refused":
                said = f"{len(results)} of {len(cases)}: {one.case}: {one.outcome} {one.reason}".rstrip()
                _say(said)
    finally:  # also what was known when it was interrupted
        table = combinations.markdown(results, len(cases), _as_typed(options), time.monotonic() - begun)
        counts = combinations.counts(results)
        known_now = {"asked": len(cases)} | counts | {"cases": [one.to_dict() for one in results]}
        _deliver(options, table, known_now)
    return 0 if counts["learns"] + counts["refused"] == len(cases) else 1


def _methods(options: argparse.Namespace) -> int:
    from labkit.proofs import methods
    from labkit.runs.checked import formatted

    known = {case.method for case in methods.cases([("", Experiment())], [2])}
    if unknown := [name for name in options.method if name not in known]:
        raise UsageError(f"there is no method {unknown[0]!r} here; known: {', '.join(sorted(known))}")
    _check_output(options)
    recipes = [(name, recipe(name).replace(*options.set)) for name in options.recipes or ["vision-ddp"]]
    cases = methods.cases(recipes, options.ranks, options.method)
    for case in cases:
        if case.method == methods.PLAIN:
            case.experiment.check()
    learned: list[methods.Learned] = []
    begun = time.monotonic()
    try:
        for one in methods.run(cases):
            learned.append(one)
            what = f"loss {formatted(one.loss, '.4f')}" if one.loss is not None else one.reason
            said = (
                f"{len(learned)} of {len(cases)}: {one.case.recipe}, {one.case.ranks} ranks, {one.case.method}: {what}"
            )
            _say(said)
    finally:  # also what was known when it was interrupted
        table = methods.markdown(learned, len(cases), _as_typed(options), time.monotonic() - begun)
        _deliver(options, table, {"asked": len(cases), "methods": [one.to_dict() for one in learned]})
    return 1 if any(one.reason.startswith("failed") for one in learned) or len(learned) < len(cases) else 0


def _sweep(options: argparse.Namespace) -> int:
    from labkit.launch.sweep import sweep
    from labkit.runs.checked import NOT_FINITE

    over = {}
    for field, values in map(parse_assignment, options.over):
        if not isinstance(values, list) or not values:
            raise UsageError(f"--over takes a list, as in --over '{field}=[1,2]'")
        over[field] = values
    _check_output(options)
    try:
        queue = sweep(_experiment(options), over, options.name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    told: set[str] = set()

    def tell(queue: Any) -> None:
        for number, point in enumerate(queue.points, 1):
            if point.done and point.label not in told:
                told.add(point.label)
                said = f"{number} of {len(queue.points)}: {point.label}: {point.state} {point.reason}"
                _say(said.rstrip())

    try:
        queue.run(tell)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if queue.problem:
        _say(queue.problem)
    rows, runs = queue.table(), queue.runs
    if options.output and runs:
        from labkit.plots.report import report

        report(runs, options.output)
    if options.json:
        _print_json({"name": options.name, "points": rows})
    else:
        for row in rows:
            figures = [f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)]
            figures += [f"{name} {value}" for name, value in row.items() if value == NOT_FINITE]
            _print_lines(f"{row['point']}: {row['state']} {row['run']} {', '.join(figures)} {row['reason']}".rstrip())
    return 0 if all(point.state in ("finished", "refused") for point in queue.points) else 1


def _validate(options: argparse.Namespace) -> int:
    experiment = _experiment(options)
    problems, warnings = experiment.problems(), experiment.warnings()
    if options.rehearse and not problems:
        from labkit.launch.rehearse import rehearse

        problem = rehearse(experiment)
        problems = problems if problem is None else [problem]
    if options.json:
        described = [{"field": p.field, "reason": p.reason, "nearest": p.nearest} for p in problems]
        _print_json({"valid": not problems, "problems": described, "warnings": [str(w) for w in warnings]})
    for warning in warnings:
        _say(str(warning))
    if problems:
        raise ExperimentError(problems)
    if not options.json:
        _print(f"This can run here. {experiment.resolve()}.")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    if options.json:
        _print_json({name: make().to_dict() for name, make in RECIPES.items()})
    for name, make in RECIPES.items() if not options.json else ():
        _print(f"{name:24} {(make.__doc__ or '').strip()}")
    return 0


def _fields(options: argparse.Namespace) -> int:
    from labkit.experiment.fields import fields

    described = fields()
    if options.json:
        _print_json([field.to_dict() for field in described])
    for field in described if not options.json else ():
        _print(f"{field.name:36} {field.kind:24} {field.description}")
    return 0


def _runs(options: argparse.Namespace) -> int:
    from labkit.runs import Run

    runs = Run.all()
    rows = [run.status for run in (runs if options.all else runs[-20:])]
    if options.json:
        _print_json(rows)
    elif not rows:
        _print("There is no run yet. Start one with: labkit run vision-ddp")
    else:
        for row in rows:
            _print(f"{_plain(row['run_id']):40} {row['state']:9} {row.get('layout') or '':10} {row['title']}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from labkit.experiment.resume import carried_code
    from labkit.runs import Run
    from labkit.runs.follow import summary_text

    run = Run.attach(options.run)
    status, summary = run.status, run.summary()
    if options.json:
        experiment = run.experiment
        described = {"status": status, "summary": summary, "experiment": experiment.to_dict()}
        _print_json(described | {"code": carried_code(experiment) or None})
        return 0
    _print(f"{run.id}: {status['state']}  {status['title']}")
    _print(f"directory {run.directory.path}")
    with contextlib.suppress(ExperimentError):
        if code := carried_code(run.experiment):
            _print(f"code: this run executes {code}")
    if status.get("cause"):
        _print(f"cause: {status['cause']['message']}")
    _print_lines(summary_text(summary))
    log = run.logs(0, 10)
    if log:
        _print("")
        _print("last lines of rank 0:")
        _print_lines(log)
    return 0


def _stop(options: argparse.Namespace) -> int:
    from labkit.runs import Run

    if bool(options.run) == options.all:
        raise UsageError("name one run, or say --all")
    runs = [run for run in Run.all() if not run.done] if options.all else [Run.attach(options.run)]
    for run in runs:
        run.request_stop(options.grace)
    states = {run.id: run.stop(options.grace).state for run in runs}
    if options.json:
        _print_json(states)
    for name, state in states.items() if not options.json else ():
        _print(f"{name}: {state}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from labkit.runs import Run, compare
    from labkit.runs.checked import figure_or_words

    if bool(options.runs) == options.all:
        raise UsageError("name the runs to compare, or say --all")
    runs = (
        [run for run in Run.all() if run.state in TERMINAL]
        if options.all
        else [Run.attach(name) for name in options.runs]
    )
    if not runs:
        raise ExperimentError([Problem("", "there is no run to compare yet")])
    comparison = compare(runs, options.baseline, skip_unreadable=options.all)
    for reason in comparison.left_out:
        _say(f"left out: {reason}")
    if options.json:
        named = {"baseline_run_id": comparison.baseline_run_id, "left_out": comparison.left_out}
        _print_json(named | {"rows": figure_or_words(comparison.rows), "text": comparison.text()})
    else:
        _print_lines(str(comparison))
    return 0


def _report(options: argparse.Namespace) -> int:
    from labkit.runs import Run

    try:
        from labkit.plots.report import report
    except ModuleNotFoundError as error:
        raise UsageError(f"the report needs {error.name}: pip install 'labkit[lab]'") from None
    path = report([Run.attach(name) for name in options.runs], options.output)
    _print_json({"report": str(path)}) if options.json else _print(str(path))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from labkit.launch.doctor import as_dict, examine

    findings = examine()
    if options.json:
        _print_json(as_dict(findings))
    for finding in findings if not options.json else ():
        mark = {True: "ok", False: "!!", None: "--"}[finding.fine]
        _print(f"{mark}  {finding.topic:22} {finding.text}")
    return 0 if all(finding.fine is not False for finding in findings) else 1


if __name__ == "__main__":
    raise SystemExit(main())
