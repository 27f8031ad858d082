"""The parser of the command line; each command adds its own arguments to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from labkit import __version__
from labkit.cli.output import UsageError

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class Commands:
    """The commands of `labkit`, to which each room of the command line adds its own."""

    def __init__(self) -> None:
        self.parser = Parser(prog="labkit", description="A laboratory for parallel training of neural networks.")
        self.parser.add_argument("--version", action="version", version=f"labkit {__version__}")
        self._commands: Any = self.parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(self, name: str, command: Command, description: str) -> argparse.ArgumentParser:
        """Add a command and return its parser, which already takes --json."""
        parser: argparse.ArgumentParser = self._commands.add_parser(name, help=description, description=description)
        parser.set_defaults(command=command)
        parser.add_argument("--json", action="store_true", help="print JSON in the last line of standard output")
        return parser


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which an experiment is chosen and changed."""
    parser.add_argument("what", nargs="?", metavar="RECIPE|FILE.json", help="what to run (default: vision-ddp)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field: layout.dp_replicate=2"
    )
    parser.add_argument("--ranks", type=count, metavar="N", help="number of ranks: fills the axis that is -1")


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def counts(text: str) -> list[int]:
    """Parse whole numbers of at least 1, separated by commas."""
    return [count(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """Parse a duration in seconds, from 0 to less than a day."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 86400:
        raise argparse.ArgumentTypeError(f"must be seconds between 0 and 86400, got {text!r}")
    return number
