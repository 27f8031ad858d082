from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from labkit.workloads import hub
from labkit.workloads.language import Language
from labkit.workloads.vision import Vision
from tests.workloads.helpers import evaluate, reasons, train

datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")
Image = pytest.importorskip("PIL.Image", reason="needs the extra 'hub'")

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
TINY = {"width": 8, "image_size": 16, "shift": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def picture(colour: str, number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 60, (20, 30, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) - noise, 0, 255).astype(np.uint8))


def fill(folder: Path, count: int, start: int = 0) -> None:
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(start, start + count):
            picture(colour, number).save(folder / colour / f"{number}.png")


def test_a_folder_of_images_is_read_split_and_learned(tmp_path: Path) -> None:
    fill(tmp_path / "images", 10)
    options = TINY | {"data": str(tmp_path / "images")}
    assert reasons({"name": "vision"} | options) == []
    task = Vision.build(options, 0)
    facts = task.facts()
    assert facts["classes"] == ["blue", "green", "red"]
    assert (facts["train_samples"], facts["test_samples"]) == (24, 6)
    assert facts["majority_share"] == pytest.approx(1 / 3)
    batch = task.train.__getitems__([0, 23, 0])
    assert batch["x"].shape == (3, 3, 16, 16)
    assert batch["x"].dtype == torch.float32
    assert batch["y"].tolist() == [0, 2, 0]
    assert batch["x"][0].mean(dim=(1, 2)).argmax() == 2  # blue is blue: the channels are in the order RGB
    assert torch.equal(batch["x"][0], batch["x"][2])
    train(task, 12, 24, 5e-3)
    assert evaluate(task)["accuracy"] == 1.0


def test_a_folder_with_parts_keeps_them(tmp_path: Path) -> None:
    fill(tmp_path / "images" / "train", 4)
    fill(tmp_path / "images" / "test", 2, start=100)
    facts = Vision.build(TINY | {"data": str(tmp_path / "images")}, 0).facts()
    assert (facts["train_samples"], facts["test_samples"]) == (12, 6)


def test_a_parquet_file_of_images_with_columns_of_any_name(tmp_path: Path) -> None:
    colours = [colour for colour in COLOURS for _ in range(5)]
    rows = {"photo": [picture(c, n) for n, c in enumerate(colours)], "kind": colours}
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("string")})
    path = tmp_path / "images.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    with pytest.raises(
        ValueError, match=r"no column looks like labels; name it with workload.label_column; columns: photo, kind"
    ):
        Vision.build(TINY | {"data": str(path)}, 0)
    with pytest.raises(ValueError, match=r"there is no column 'colour' \(workload.label_column\)"):
        Vision.build(TINY | {"data": str(path), "label_column": "colour"}, 0)
    with pytest.raises(ValueError, match="column 'kind' contains text, not images"):
        Vision.build(TINY | {"data": str(path), "label_column": "kind", "image_column": "kind"}, 0)
    task = Vision.build(TINY | {"data": str(path), "label_column": "kind"}, 0)
    assert task.facts()["classes"] == sorted(COLOURS)
    assert task.model(task.test.__getitems__([0])["x"]).shape == (1, 3)


def test_integer_labels_are_classes_in_numeric_order(tmp_path: Path) -> None:
    labels = [10, 2, 10, 2, 10, 2, 10, 2, 10, 2]
    rows = {"image": [picture("red", n) for n in range(10)], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    path = tmp_path / "images.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    task = Vision.build(TINY | {"data": str(path)}, 0)
    assert task.facts()["classes"] == ["2", "10"]
    assert task.train.__getitems__(range(2))["y"].tolist() == [1, 0]


TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def test_a_text_file_needs_no_package_and_is_split_in_order(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    options = {"data": str(path), "context": 16, "width": 16, "depth": 1}
    assert reasons({"name": "language"} | options) == []
    task = Language.build(options, 0)
    assert bytes(task.corpus.train) + bytes(task.corpus.test) == TEXT.encode()
    folder = Language.build(options | {"data": str(tmp_path)}, 0)
    assert bytes(folder.corpus.train) == bytes(task.corpus.train)


def test_a_parquet_file_of_text_joins_its_rows_up_to_the_limit(tmp_path: Path) -> None:
    rows = {"title": ["a", "b"] * 20, "text": [f"{n} {TEXT[:200]}" for n in range(40)]}
    path = tmp_path / "text.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    options = {"data": str(path), "context": 16, "width": 16, "depth": 1, "max_characters": 3000}
    task = Language.build(options, 0)
    whole = (bytes(task.corpus.train) + bytes(task.corpus.test)).decode()
    assert whole == "\n\n".join(rows["text"])[:3000]
    titles = Language.build(options | {"text_column": "title", "context": 4}, 0)
    assert bytes(titles.corpus.train).startswith(b"a\n\nb\n\na")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("broken.parquet", b"this is no parquet", "cannot read .*broken.parquet"),
        ("latin.txt", "ä".encode("latin-1") * 3000, "latin.txt is not UTF-8 text"),
        ("short.txt", b"short", "the training text is shorter than one window of 64 tokens"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        Language.build({"data": str(tmp_path / name)}, 0)


def test_without_the_hub_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert reasons({"name": "vision", "data": "owner/name"}) == []
    with pytest.raises(ValueError, match="cannot reach the Hugging Face hub to load 'owner/name'; without internet"):
        Vision.build({"data": "owner/name"}, 0)


def test_code_of_a_data_set_is_never_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def remember(*args: object, **kwargs: object) -> None:
        asked.append(kwargs)
        raise FileNotFoundError("nothing here")

    monkeypatch.setattr(datasets, "load_dataset", remember)
    with pytest.raises(ValueError, match="cannot load 'owner/name:small' from the Hugging Face hub: nothing here"):
        Vision.build({"data": "owner/name:small"}, 0)
    assert not any("trust_remote_code" in keywords for keywords in asked)


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.workloads.rules.find_spec", lambda name: None)
    for workload in (
        {"name": "vision", "data": "owner/name"},
        {"name": "language", "data": "owner/name"},
        {"name": "language", "model": "transformers", "transformers_config": {"model_type": "llama"}},
    ):
        (reason,) = reasons(workload)
        assert "pip install 'labkit[hub]'" in reason


def test_the_cause_of_an_error_that_says_nothing_is_told() -> None:
    """issue 11, B 16: the library says that an error occurred, and its causes say which."""
    outer = RuntimeError("An error occurred while generating the dataset")
    outer.__cause__ = ValueError("")
    outer.__cause__.__context__ = KeyError("no column named text")
    for data in ("./mine.csv", "somebody/something"):
        message = hub.explain_load_error(data, outer)
        assert "An error occurred while generating the dataset: " in message
        assert "no column named text" in message
    assert hub.explain_load_error("./mine.csv", OSError()).endswith("cannot read ./mine.csv: OSError")
