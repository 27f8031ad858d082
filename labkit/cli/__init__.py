"""The command line: the same for people, tests and CI.

Exit code 0: success. 1: the run failed, or the claim does not hold. 2: the request is wrong; the reason is one sentence
on standard error and nothing was launched. With --json the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from labkit.cli import inspect, profile, prove, run
from labkit.cli.output import OutputError, UsageError, flush, give_up_output, refuse, say
from labkit.cli.parser import Command, Commands
from labkit.experiment import ExperimentError


def _commands() -> Commands:
    commands = Commands()
    for room in (run, prove, inspect, profile):
        room.add_to(commands)
    return commands


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print a warning for users, e.g. about a setting that has a new name, as one sentence; drop those of libraries."""
    if issubclass(category, FutureWarning):
        say(f"{message}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` default to those of the process."""
    # What the terminal's encoding lacks, and lone surrogates, are printed as escapes.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = argparse.Namespace(launched=False)
    warnings.showwarning = _show_warning
    try:
        _commands().parser.parse_args(arguments, options)
        options.words = list(sys.argv[1:] if arguments is None else arguments)
        command: Command = options.command
        code = command(options)
        flush()
        return code
    except UsageError as error:
        return refuse(str(error))
    except ExperimentError as error:
        return refuse(*map(str, error.problems))
    except BrokenPipeError:
        give_up_output()  # the reader of our output has gone (labkit … | head)
        return 0
    except OutputError as error:
        give_up_output()
        say(f"cannot write the output: {error}")
        return 1
    except TimeoutError as error:
        say(str(error))
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        reason = str(error) if error.errno is None else f"{where}{error.strerror}"
        if not options.launched:
            return refuse(reason)
        say(f"{reason} (the run was launched)")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
