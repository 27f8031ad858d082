"""What a proof compares beside losses, and what it says where something differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.cli import main
from labkit.experiment import Experiment
from labkit.proofs.likely_reason import likely_reason
from labkit.proofs.parity import check, parity_config, provable
from labkit.proofs.saved_buffers import _max_difference
from labkit.runs import RunFailed
from tests.training import odd_tasks, own_tasks


def own(name: str, layout: dict[str, Any], **changes: Any) -> Experiment:
    return Experiment().set(
        {
            "workload": {"name": "custom", "path": f"{Path(own_tasks.__file__)}:{name}"},
            "layout": layout,
            "training.steps": 4,
            "training.global_batch": 12,
        }
        | changes
    )


def test_it_compares_one_evaluation_and_the_buffers() -> None:
    found = check(own("running_mean", {"dp_replicate": 2}), steps=4, precisions=("fp64",))
    assert found["parity"] is True, found["text"]
    assert found["max_metric_difference"] <= 1e-9
    assert found["max_buffer_difference"] <= 1e-9
    assert found["buffer_beyond"] is None


def test_a_buffer_alone_that_differs_fails_it() -> None:
    """Running variances of parts are not that of the whole; in one microbatch a time the loss differs too."""
    found = check(own("only_counts_samples", {"dp_replicate": 2}), steps=4, precisions=("fp64",))
    assert found["parity"] is False
    assert found["first_step_beyond"] is None
    assert found["buffer_beyond"] == "blocks.block_0.samples"
    assert "DIFFERS from one process in blocks.block_0.samples" in found["text"][0]
    assert any("likely reason" in line and "blocks.block_0.samples" in line for line in found["text"])


def test_a_held_out_metric_alone_that_differs_fails_it() -> None:
    """issue 11, A7."""
    verdict = check(own("evaluates_by_ranks", {"dp_replicate": 2}), steps=3, precisions=("fp64",))
    assert verdict["parity"] is False
    assert (verdict["first_step_beyond"], verdict["buffer_beyond"]) == (None, None)
    assert verdict["max_loss_difference"] <= 1e-9 < verdict["max_metric_difference"]
    assert "DIFFERS from one process in its held-out metrics" in verdict["text"][0]


def test_a_proof_keeps_what_is_trained_complex() -> None:
    found = check(own("complex_weights", {"dp_replicate": 2}), steps=4)
    assert found["parity"] is True, found["text"]


def test_batch_normalisation_is_named_as_the_reason() -> None:
    found = check(own("batch_norm", {"dp_replicate": 2}), steps=4, precisions=("fp64",))
    assert found["parity"] is False
    assert any(line.startswith("likely reason: ") and "batch normalisation" in line for line in found["text"])


def test_a_loss_that_is_no_mean_over_samples_is_named_as_the_reason() -> None:
    with pytest.raises(RunFailed, match="batch_weight"):
        check(own("hidden_mask", {"dp_replicate": 2}), steps=2, precisions=("fp64",))


@pytest.mark.parametrize(
    "changes",
    [{"quantization.qat": "int8"}, {"optimizer.state_bits": 8}],
    ids=str,
)
def test_it_picks_a_format_that_can_be_proved(changes: dict[str, Any]) -> None:
    """issue 11, A19."""
    wanted = own("complex_weights", {"dp_replicate": 2}, **changes)
    formats, left_out = provable(wanted, 4, ("fp64", "fp32"))
    assert formats == ("fp32",)
    assert len(left_out) == 1
    assert left_out[0].startswith("fp64 was left out; the proof holds for fp32: ")
    assert provable(wanted, 4, ("fp64",)) == (("fp64",), []), "what was asked for by itself is refused by the rules"
    assert not parity_config(wanted, 4, "fp32").problems()


def test_and_says_which() -> None:
    found = check(own("branch_by_batch", {"dp_shard": 2, "zero_stage": 1}, **{"quantization.qat": "int8"}), steps=3)
    assert list(found["precisions"]) == ["fp32"]
    assert any(line.startswith("fp64 was left out") for line in found["text"])


XGLM = {"model_type": "xglm", "d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32}


@pytest.mark.parametrize("kind", ["custom", "xglm"])
def test_a_model_that_float64_overflows_is_proved_in_float32(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """issue 11, A18."""
    wanted = own("overflows_in_float64", {"dp_replicate": 2}, **{"launch.device": "cpu"})
    if kind == "xglm":
        pytest.importorskip("transformers", reason="needs the extra 'hub'")
        language = {"name": "language", "model": "transformers", "transformers_config": XGLM, "context": 16}
        wanted = wanted.set({"workload": language | {"max_characters": 20_000}, "training.global_batch": 4})
    given_file = tmp_path / "wanted.json"
    given_file.write_text(json.dumps(wanted.to_dict()))
    assert main(["check", str(given_file), "--steps", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("fp32: equal to one process over 2 steps")
    assert shown[-1].startswith("fp64 was left out; the proof holds for fp32: the model cannot be computed in float64")
    assert "without overflow" in shown[-1]
    if kind == "xglm":
        return
    assert main(["check", str(given_file), "--steps", "2", "--precision", "fp64"]) == 1
    words = "the check could not be made: the proof in float64 is impossible for this model, use --precision fp32: "
    assert words in capsys.readouterr().err


def test_a_model_that_fails_in_every_format_is_not_blamed_on_float64() -> None:
    frozen = {"name": "custom", "path": f"{Path(odd_tasks.__file__)}:everything_frozen"}
    with pytest.raises(RunFailed, match=r"^the model has nothing to train: all 4 parameters are frozen"):
        check(own("running_mean", {"dp_replicate": 2}, workload=frozen), steps=2)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_differences_of_buffers_are_relative_above_one(numbers: list[float], by: float) -> None:
    one = np.array(numbers)
    assert _max_difference(one, one) == 0
    assert _max_difference(one + by, one) <= by * (1 + 1e-6) + 1e-9
    assert _max_difference(one[:0], one[:0]) == 0
    assert _max_difference(one, np.zeros((len(numbers), 2))) == float("inf")
    assert _max_difference(np.append(one, np.nan), np.append(one, 0.0)) == float("inf")


def test_every_place_has_a_likely_reason() -> None:
    wanted = own("masked", {"dp_replicate": 2})
    said = {
        likely_reason(wanted, 1, None, []),
        likely_reason(wanted.set({"layout": {"pp": 2}}), 1, None, []),
        likely_reason(Experiment().replace("layout=dp2"), 2, None, []),
        likely_reason(wanted, None, "mean", []),
        likely_reason(wanted, None, None, []),
        likely_reason(wanted, 1, None, ["x: dropout draws different numbers"]),
    }
    assert len(said) == 6
