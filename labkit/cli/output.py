"""What the command line prints, and what it does when nothing can be printed."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from typing import Any

from labkit.experiment import safe_files
from labkit.experiment.safe_files import printable


class UsageError(Exception):
    """The command line itself is wrong; the message says why in one sentence."""


class OutputError(Exception):
    """Standard output could not be written, for example on a full disk."""


def flush() -> None:
    """Flush standard output; raise OutputError if it cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from None


def give_up_output() -> None:
    """Discard whatever is still buffered for standard output, so that flushing it at exit cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(sentence: str) -> None:
    """Print one sentence to standard error, with `labkit:` before it and a full stop after it."""
    stop = "" if sentence.endswith((".", ")")) else "."
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(f"labkit: {printable(sentence)}{stop}", file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """Print one line of progress to standard error."""
    print(printable(line), file=sys.stderr)


def refuse(*sentences: str) -> int:
    """Print the reasons for a refusal to standard error and return exit code 2."""
    for sentence in sentences:
        say(sentence)
    return 2


def print_line(text: str) -> None:
    """Print one line to standard output, with control characters escaped; raise OutputError if that fails."""
    try:
        print(printable(text))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from None


def print_lines(text: str) -> None:
    """Print the lines of a text to standard output."""
    for line in text.splitlines():
        print_line(line)


def print_json(data: Any) -> None:
    """Print `data` as one line of JSON to standard output, and flush it."""
    print_line(safe_files.to_json(data))
    flush()


def check_output(options: argparse.Namespace) -> None:
    """Raise UsageError if the folder of `--output` does not exist; called before anything is launched."""
    if options.output and not options.output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {options.output.parent} to write to")


def as_typed(options: argparse.Namespace) -> str:
    """Return the command line as it was typed, without --json, for the heading of a table."""
    return "labkit " + shlex.join(word for word in options.words if word != "--json")


def deliver(options: argparse.Namespace, table: str, data: Any) -> None:
    """Write a table in Markdown to `--output` or standard output, and `data` as JSON if `--json` was given."""
    if options.output:
        options.output.write_text(table, encoding="utf-8", errors="backslashreplace")
    else:
        print_lines(table)
    if options.json:
        print_json(data)
