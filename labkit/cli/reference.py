"""The reference page of all settings in Markdown, from the same source as `labkit fields` and the form's tooltips."""

from __future__ import annotations

from itertools import groupby

from labkit.experiment.fields import Field

INTRODUCTION = """\
# Settings

Every field of an experiment, as `--set FIELD=VALUE` and `Experiment.set({"FIELD": value})` take it. `null` means that
labkit chooses. Made by `labkit fields --markdown`; do not edit.
"""


def settings_page(fields: list[Field]) -> str:
    """Return the page: one table per section of the experiment, in the order of `fields`."""
    parts = [INTRODUCTION]
    for section, members in groupby(fields, key=lambda field: field.name.rpartition(".")[0]):
        rows = [
            f"| `{field.name}` | {cell(field.kind)} | {_default(field)} | {cell(field.description)} |"
            for field in members
        ]
        parts.append(
            "\n".join(
                [
                    f"## {section or 'The experiment'}\n",
                    "| field | values | default | meaning |",
                    "|---|---|---|---|",
                    *rows,
                ]
            )
        )
    return "\n".join(part + "\n" for part in parts)


def _default(field: Field) -> str:
    return "" if field.default is None else f"`{cell(str(field.default))}`" if field.default != "" else '`""`'


def cell(text: str) -> str:
    """Return text for one cell of a table: on one line, without bars that would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")
