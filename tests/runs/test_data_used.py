"""What a run took from its data is said in one line, whatever a directory holds."""

from __future__ import annotations

from typing import Any

import pytest

from labkit.runs.data_used import data_used


def test_files_columns_classes_and_what_was_left_out_are_named() -> None:
    facts = {
        "train_samples": 1200,
        "test_samples": 300,
        "files": 1,
        "held_out": "2 files named test",
        "text_column": "body",
        "classes": ["a", "b"],
        "skipped_files": {"hidden": 3, "no text": 1},
    }
    assert data_used(facts) == (
        "1,200 samples to train on; 300 samples held out; 1 file for training; held out: 2 files named test; "
        "text in column body; 2 classes; left out: 3 (hidden), 1 (no text)"
    )


@pytest.mark.parametrize("facts", [None, [], "x", 3, {}, {"files": "many", "classes": 3, "skipped_files": [1]}])
def test_facts_from_elsewhere_may_be_anything(facts: Any) -> None:
    assert data_used(facts) == ""
