"""Commands that prove claims: check, combinations and methods."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from labkit.cli.output import UsageError, as_typed, check_output, deliver, print_json, print_line, progress, say
from labkit.cli.parser import Commands, add_experiment, count, counts
from labkit.cli.run import requested_experiment
from labkit.experiment import Experiment
from labkit.experiment.assignment import parse_assignment
from labkit.experiment.recipes import recipe


def add_to(commands: Commands) -> None:
    """Add the commands of this file and their arguments."""
    parser = commands.add("check", check, "Prove that a layout computes what one process computes.")
    add_experiment(parser)
    parser.add_argument("--steps", type=count, help="optimizer steps to compare (default: 20)")
    parser.add_argument(
        "--precision", choices=["both", "fp64", "fp32"], default="both", help="precisions to prove (default: both)"
    )
    parser.add_argument(
        "--matrix",
        nargs="?",
        const="all",
        choices=["all", "sample"],
        help="prove all layouts of small models: every product of axes up to 8 (--ranks) ranks, all pairs of options",
    )
    parser.add_argument("--workload", action="append", metavar="NAME", help="only these models of the matrix")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the matrix as a table in Markdown")
    parser.add_argument(
        "--resume",
        "--go-on",
        type=Path,
        metavar="FILE.jsonl",
        help="keep the matrix' results in this file, and run only the cases that it lacks",
    )
    parser = commands.add(
        "combinations", combinations, "Run every pair of methods that may be combined: each must learn, or is refused."
    )
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="names",
        metavar="NAME",
        help="only those with this method or layout",
    )
    parser.add_argument("--ranks", type=count, metavar="N", help="only those with at most this number of ranks")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the table in Markdown")
    parser = commands.add(
        "methods", methods, "Measure what every compressor and update rule learns and sends, at its defaults."
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="what is trained (default: vision-ddp)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of all runs")
    parser.add_argument("--ranks", type=counts, default=[2], metavar="N[,N…]", help="numbers of ranks (default: 2)")
    parser.add_argument("--method", action="append", default=[], metavar="NAME", help="only these methods")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the table in Markdown")


def check(options: argparse.Namespace) -> int:
    """Compare a layout with one process, or prove the whole matrix of layouts."""
    from labkit.proofs.parity import STEPS
    from labkit.proofs.parity import check as compare_with_one_process
    from labkit.runs import RunFailed

    precisions = ("fp64", "fp32") if options.precision == "both" else (options.precision,)
    if options.matrix:
        return _check_matrix(options, precisions)
    if options.workload or options.output:
        raise UsageError("--workload and -o belong to --matrix")
    experiment = requested_experiment(options)
    experiment.check()
    try:
        result = compare_with_one_process(experiment, options.steps or STEPS, precisions, progress)
    except RunFailed as error:
        say(f"the check could not be made: {error}")
        return 1
    for line in result["text"]:
        print_line(line)
    if options.json:
        print_json(result)
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
    check_output(options)
    changes = dict(parse_assignment(text) for text in options.set)
    cases = matrix.cases(families, options.ranks or 8, precisions, changes)
    if options.matrix == "sample":
        cases = matrix.sample(cases)
    try:
        log = MatrixLog(options.resume) if options.resume else None
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    results: list[matrix.Result] = []
    try:
        follow(cases, results, quiet=options.json, log=log)
    finally:  # also the results so far when it is interrupted
        counts = matrix.counts(results)
        seconds = sum(result.seconds for result in results)
        table = matrix.markdown(results, len(cases), as_typed(options), seconds)
        deliver(options, table, {"asked": len(cases)} | counts | {"cases": [each.to_dict() for each in results]})
    return 0 if counts["equal"] + counts["refused"] == len(cases) else 1


def combinations(options: argparse.Namespace) -> int:
    """Run every pair of methods that may be combined."""
    from labkit.launch import warm
    from labkit.proofs import combinations as proof

    try:
        requested = [proof.parse_setting(text) for text in options.names]
    except ValueError as error:
        raise UsageError(str(error)) from None
    check_output(options)
    cases = proof.with_settings(proof.cases(), requested, options.ranks)
    results: list[proof.CombinationResult] = []
    begun = time.monotonic()
    warm()
    try:
        for result in proof.run(cases):
            results.append(result)
            if result.outcome != "refused":
                say(f"{len(results)} of {len(cases)}: {result.case}: {result.outcome} {result.reason}".rstrip())
    finally:  # also the results so far when it is interrupted
        table = proof.markdown(results, len(cases), as_typed(options), time.monotonic() - begun)
        counts = proof.counts(results)
        deliver(options, table, {"asked": len(cases)} | counts | {"cases": [each.to_dict() for each in results]})
    return 0 if counts["learns"] + counts["refused"] == len(cases) else 1


def methods(options: argparse.Namespace) -> int:
    """Measure what every compressor and update rule learns and sends."""
    from labkit.proofs import methods as proof
    from labkit.runs.checked import formatted

    names = {case.method for case in proof.cases([("", Experiment())], [2])}
    if unknown := [name for name in options.method if name not in names]:
        raise UsageError(f"there is no method {unknown[0]!r} here; known: {', '.join(sorted(names))}")
    check_output(options)
    recipes = [(name, recipe(name).replace(*options.set)) for name in options.recipes or ["vision-ddp"]]
    cases = proof.cases(recipes, options.ranks, options.method)
    for case in cases:
        if case.method == proof.PLAIN:
            case.experiment.check()
    results: list[proof.MethodResult] = []
    begun = time.monotonic()
    try:
        for result in proof.run(cases):
            results.append(result)
            case, number = result.case, f"{len(results)} of {len(cases)}"
            outcome = f"loss {formatted(result.loss, '.4f')}" if result.loss is not None else result.reason
            say(f"{number}: {case.recipe}, {case.ranks} ranks, {case.method}: {outcome}")
    finally:  # also the results so far when it is interrupted
        table = proof.markdown(results, len(cases), as_typed(options), time.monotonic() - begun)
        deliver(options, table, {"asked": len(cases), "methods": [each.to_dict() for each in results]})
    return 1 if any(each.reason.startswith("failed") for each in results) or len(results) < len(cases) else 0
