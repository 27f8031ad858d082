"""The recorded drives on disk: arrays in `driving.npz`, and a description in `driving.json`. Needs numpy only."""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "data"
NAME = "driving"

SCALE = np.array([1.0, 25.0, 4.0, 8.0, 2.0], dtype=np.float32)
"""Scale of presence, x, y, vx, vy (m, m/s): a lane becomes 1 wide, and decisive distances become about 1."""

Arrays = dict[str, NDArray[Any]]


def write(folder: Path, arrays: Arrays, about: dict[str, Any]) -> None:
    """Write both files; the same arrays give the same bytes (`np.savez` would store the time of day in the archive)."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{NAME}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED)
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (folder / f"{NAME}.json").write_text(text, encoding="utf-8")


@lru_cache(maxsize=1)
def load() -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and the description; read once per process."""
    with np.load(FOLDER / f"{NAME}.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, about()


@lru_cache(maxsize=1)
def about() -> dict[str, Any]:
    """Return how the data was made and facts about it."""
    description: dict[str, Any] = json.loads((FOLDER / f"{NAME}.json").read_text(encoding="utf-8"))
    return description


def normalise(observation: NDArray[Any]) -> NDArray[np.float32]:
    """Scale observations [..., vehicles, 5] in metres to network input [..., vehicles · 5] of about unit size."""
    scaled: NDArray[np.float32] = observation.astype(np.float32) / SCALE
    return scaled.reshape(*observation.shape[:-2], -1)
