"""The layout: a grid of ranks, a short form, an equation."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.layout import AXES, MESH_ORDER, Layout

sizes = st.fixed_dictionaries({axis: st.sampled_from([1, 1, 1, 2, 3]) for axis in AXES})
layouts = sizes.map(lambda chosen: Layout(**chosen))


@settings(deadline=None)
@given(layouts)
def test_the_grid_covers_all_ranks_once(layout: Layout) -> None:
    rows = layout.grid()
    assert [row["rank"] for row in rows] == list(range(layout.world_size))
    places = [tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size == prod(layout.sizes.values())
    for place in places:
        assert all(0 <= index < layout.sizes[axis] for axis, index in zip(MESH_ORDER, place, strict=True))
    for row in rows:
        assert set(row) == {"rank"} | {axis for axis in AXES if getattr(layout, axis) > 1}


@settings(deadline=None)
@given(layouts)
def test_ranks_are_row_major_with_the_last_axis_closest(layout: Layout) -> None:
    places = [tuple(layout.coordinates(rank)[axis] for axis in MESH_ORDER) for rank in range(layout.world_size)]
    assert places == sorted(places)


@settings(deadline=None)
@given(layouts)
def test_the_short_form_reads_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout
    for sign in ("*", "x", ",", " "):
        assert Layout.parse(str(layout).replace("·", sign)) == layout
    assert Layout.model_validate(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1", {}),
        ("", {}),
        ("dp2", {"dp_replicate": 2}),
        ("dp_replicate4·tp2", {"dp_replicate": 4, "tp": 2}),
        ("shard8", {"dp_shard": 8}),
        ("dp-1·pp2", {"dp_replicate": -1, "pp": 2}),
        (" dp2 · tp2 ", {"dp_replicate": 2, "tp": 2}),
    ],
)
def test_parse(text: str, found: dict[str, int]) -> None:
    assert Layout.parse(text) == Layout(**found)


@pytest.mark.parametrize(
    "text", ["dp", "2", "dp2.5", "dq2", "dp2·dp2", "dp2·dp_replicate2", "dp2x", "dp--1", "ðp2", "dp²"]
)
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        Layout.parse(text)


@settings(deadline=None)
@given(layouts, st.sampled_from(AXES), st.integers(1, 4))
def test_resolve_fills_the_open_axis(layout: Layout, axis: str, size: int) -> None:
    full = layout.model_copy(update={axis: size})
    opened = layout.model_copy(update={axis: -1})
    assert opened.resolve(full.world_size) == full
    assert full.resolve(full.world_size) == full
    with pytest.raises(ValueError, match="open axis"):
        _ = opened.world_size


@settings(deadline=None)
@given(layouts, st.integers(1, 64))
def test_resolve_refuses_with_the_equation(layout: Layout, world_size: int) -> None:
    assume(layout.world_size != world_size)
    with pytest.raises(ValueError, match=f"= {layout.world_size}, but world_size is {world_size}"):
        layout.resolve(world_size)


def test_the_equation_is_the_one_of_the_design() -> None:
    assert Layout(dp_replicate=2, tp=2).equation(8) == "dp_replicate 2 × tp 2 × pp 1 = 4, but world_size is 8"
    assert "dp_shard 3" in Layout(dp_shard=3).equation(8)
    with pytest.raises(ValueError, match="at least 1"):
        Layout().resolve(0)


@pytest.mark.parametrize(
    "wrong", [{"tp": 0}, {"tp": -2}, {"tp": 1.5}, {"dp": 2}, {"tp": -1, "pp": -1}, {"zero_stage": 4}]
)
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Layout.model_validate(wrong)


def test_data_parallel_ranks_see_different_samples() -> None:
    assert Layout(dp_replicate=2, dp_shard=3, tp=2).data_parallel == 6


def test_one_process_reads_as_it_prints() -> None:
    assert Experiment().replace(f"layout={Layout()}").layout == Layout()
    with pytest.raises(ExperimentError):
        Experiment().replace("layout=2")
