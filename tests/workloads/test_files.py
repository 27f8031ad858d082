"""Files and folders named as splits are splits in every format, and every fault names its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.workloads.hub_text import hub_text
from labkit.workloads.language import Language
from labkit.workloads.splits import split_of

LIMIT = 100_000


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"), ("wiki.train.txt", "train"), ("train-00000-of-00002.parquet", "train"),
        ("X_train", "train"), ("trainset", "train"), ("training_data.csv", "train"), ("TRAIN", "train"),
        ("valid.txt", "validation"), ("val", "validation"), ("dev.jsonl", "validation"), ("eval", "validation"),
        ("my_validation.csv", "validation"), ("test.TXT", "test"), ("testData", "test"), ("wiki.test.tokens", "test"),
        ("test1.txt", "test"), ("held-out.txt", "test"), ("holdout", "test"), ("train_test.txt", "test"),
        ("latest.txt", None), ("contest", None), ("devices", None), ("evaluate_me", None), ("pretrained.txt", None),
        ("trains", None), ("values.txt", None), ("book.txt", None), ("01.txt", None), ("", None),
    ],
)  # fmt: skip
def test_names_say_the_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def write(path: Path, words: list[str]) -> None:
    """Rows of a text in whichever format the ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")
        datasets.Dataset.from_dict({"text": words}).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": word} for word in words]))
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{n},"{word}"\n' for n, word in enumerate(words)))
    else:
        path.write_text("\n\n".join(words))


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".md"])
@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train", "valid", "test"), "test"),
        (("wiki.train", "wiki.valid", "wiki.test"), "test"),
        (("sub/training/a", "sub/val/a", "sub/testing/a"), "test"),
        (("book", "val", "test"), "test"),
        (("train-00000-of-00001", "validation-00000-of-00001", None), "validation"),
    ],
)
def test_a_test_split_is_held_out_and_never_trained_on(
    tmp_path: Path, ending: str, names: tuple[str, ...], split: str
) -> None:
    for name, word in zip(names, ("alpha", "beta", "gamma"), strict=True):
        if name is not None:
            write(tmp_path / (name + ending), [word] * 3)
    train, test, about = hub_text(str(tmp_path), "", LIMIT)
    assert train == "alpha\n\nalpha\n\nalpha"
    held_out = {"test": "gamma", "validation": "beta"}[split]
    assert test == "\n\n".join([held_out] * 3)
    assert about["held_out"] == f"1 file named {split}"
    assert about["files"] == 1
    if split == "test":
        assert about["skipped_files"] == {"validation split, next to a test split": 1}


def test_without_names_of_splits_all_files_are_read_also_in_sub_folders(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", ["b"])
    write(tmp_path / "a" / "deep" / "c.txt", ["c"])
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "hidden.txt", ["hidden"])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write(tmp_path / "README", ["about"])
    train, test, about = hub_text(str(tmp_path), "", LIMIT)
    assert train == "c\n\nb"
    assert test is None
    assert about == {
        "files": 2,
        "held_out": "the end of the text",
        "held_out_files": [],
        "skipped_files": {"hidden": 1, "another kind of file": 2},
    }


def test_what_was_taken_stands_in_the_facts(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ["some text"] * 40)
    write(tmp_path / "test.jsonl", ["other text", ""] * 20)
    facts = Language.build({"data": str(tmp_path), "context": 16, "width": 16, "depth": 1}, 0).facts()
    assert facts["text_column"] == "text"
    assert facts["held_out"] == "1 file named test"
    assert facts["held_out_files"] == ["test.jsonl"]
    assert facts["empty_rows"] == 20


def test_a_folder_with_held_out_files_only_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "test.txt", ["x"])
    with pytest.raises(ValueError, match=r"contains held-out files only: test\.txt"):
        hub_text(str(tmp_path), "", LIMIT)


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["x"])
    write(tmp_path / "b.csv", ["x"])
    with pytest.raises(ValueError, match=r"several kinds, json \(a\.jsonl\), csv \(b\.csv\)"):
        hub_text(str(tmp_path), "", LIMIT)


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_choice_between_columns_is_refused_with_the_list(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", [{"url": "http://x", "body": "words", "n": 1}] * 3)
    with pytest.raises(ValueError, match=r"several columns may be the text: url, body; name it with workload.text_col"):
        hub_text(path, "", LIMIT)
    assert hub_text(path, "body", LIMIT)[0] == "words\n\nwords\n\nwords"
    assert hub_text(save(tmp_path / "b.jsonl", [{"title": "a", "text": "b"}]), "", LIMIT)[0] == "b"
    with pytest.raises(ValueError, match="several columns may be the text: text, content"):
        hub_text(save(tmp_path / "c.jsonl", [{"content": "a", "text": "b"}]), "", LIMIT)
    with pytest.raises(ValueError, match=r"no column contains text; .*: n \(int\)"):
        hub_text(save(tmp_path / "d.jsonl", [{"n": 1}]), "", LIMIT)
    with pytest.raises(ValueError, match=r"there is no column 'x' .*; columns: url, body, n"):
        hub_text(path, "x", LIMIT)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: "),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: a row must be an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"a\.jsonl, line 2: .*'text' contains half a character"),
        ("a.jsonl", b'{"text": "a"}\n' * 300 + b'{"text": 3}\n', r"a\.jsonl, line 301: .*contains int, not text"),
        ("a.json", b'[{"text": "a"},]', r"a\.json, line 1: "),
        ("a.csv", b"text,n\na,1\nb\n", r"a\.csv, line 3: 1 fields, but the first line has 2"),
        ("a.csv", b"text,text\na,1\n", r"a\.csv names a column twice"),
        ("a.txt", "ä".encode("utf-16"), r"a\.txt is not UTF-8 text \(byte 0\)"),
        ("a.parquet", b"PAR1 and nothing", r"cannot read .*a\.parquet"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00", r"a\.txt\.gz: it contains no text in a known format"),
        ("a.png", b"\x89PNG\r\n\x1a\n", r"a\.png: it contains no text in a known format"),
    ],
)
def test_a_fault_names_its_file_and_place(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        hub_text(str(tmp_path / name), "", LIMIT)
    assert "\n" not in str(caught.value)


def test_the_content_decides_not_the_ending(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["in parquet"])
    (tmp_path / "a.parquet").rename(tmp_path / "a.txt")
    assert hub_text(str(tmp_path / "a.txt"), "", LIMIT)[0] == "in parquet"
    (tmp_path / "b.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert hub_text(str(tmp_path / "b.json"), "", LIMIT)[0] == "one\n\ntwo"
    (tmp_path / "c.jsonl").write_text('[{"text": "one"}, {"text": "two"}]')
    assert hub_text(str(tmp_path / "c.jsonl"), "", LIMIT)[0] == "one\n\ntwo"
    (tmp_path / "d.csv").write_text('id;text\n1;"a; b"\n2;"two\nlines"\n')
    assert hub_text(str(tmp_path / "d.csv"), "text", LIMIT)[0] == "a; b\n\ntwo\nlines"
    (tmp_path / "e.TXT").write_bytes(b"\xef\xbb\xbfwith a mark")
    assert hub_text(str(tmp_path / "e.TXT"), "", LIMIT)[0] == "with a mark"


COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def picture(path: Path, colour: str) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra 'hub'")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), COLOURS[colour], dtype=np.uint8)).save(path)


LAYOUTS = {
    "splits then classes": "{split}/{colour}/{n}.png",
    "classes then splits": "{colour}/{split}/{n}.png",
    "folders around": "data/images/{split}/{colour}/{n}.png",
    "folders below": "{split}/{colour}/more/{n}.png",
    "names of files": "{colour}/{split}_{n}.png",
}


@pytest.mark.parametrize("pattern", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_splits_of_images_are_kept_wherever_they_are_named(tmp_path: Path, pattern: str) -> None:
    from labkit.workloads.hub_images import hub_images

    for colour in COLOURS:
        for split, count in (("train", 3), ("val", 2), ("test", 1)):
            for n in range(count):
                picture(tmp_path / pattern.format(split=split, colour=colour, n=n), colour)
    images = hub_images(str(tmp_path), 8)
    assert images.classes == ["blue", "red"]
    assert (len(images.train), len(images.test)) == (6, 2)
    assert images.about["held_out"] == "files named test"
    assert images.about["skipped_files"] == {"validation split, not used": 4}
    assert images.about["images_per_class"] == {"blue": 3, "red": 3}


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    from labkit.workloads.hub_images import hub_images

    for name in ("bus", "train", "car"):
        for n in range(5):
            picture(tmp_path / name / f"{n}.png", "red")
    images = hub_images(str(tmp_path), 8)
    assert images.classes == ["bus", "car", "train"]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train/1.png", "test/1.png"], r"has no folders of classes: its 2 images are in one place \(as "),
        (["1.png", "2.png"], "has no folders of classes: its 2 images are in one place; put those"),
        (["cats/1.png", "dogs/1.png", "test/1.png"], "the folder test of .* is next to cats, dogs: is it a class or"),
        (["test/cats/1.png", "test/dogs/1.png"], r"contains held-out images only \(in test\)"),
        (["test/cats/1.png", "val/cats/1.png"], r"contains held-out folders only \(test, val\)"),
        (["train/cats/1.png", "test/cats/1.png"], r"has one class only \(cats\)"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "held-out classes that are not trained on: c"),
    ],
)
def test_images_whose_classes_cannot_be_told_are_refused(tmp_path: Path, files: list[str], sentence: str) -> None:
    from labkit.workloads.hub_images import hub_images

    for file in files:
        picture(tmp_path / file, "red")
    with pytest.raises(ValueError, match=sentence):
        hub_images(str(tmp_path), 8)


def test_a_class_with_one_image_is_noted_and_foreign_files_are_counted(tmp_path: Path) -> None:
    from labkit.workloads.hub_images import hub_images

    for n in range(5):
        picture(tmp_path / "blue" / f"{n}.png", "blue")
    picture(tmp_path / "red" / "0.png", "red")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "labels.csv").write_text("a,b\n")
    picture(tmp_path / ".ipynb_checkpoints" / "0.png", "red")
    about = hub_images(str(tmp_path), 8).about
    assert about["classes_not_held_out"] == ["red"]
    assert about["notes"] == ["the held-out part has no image of red: accuracy ignores them"]
    assert about["skipped_files"] == {"hidden": 2, "no image": 1}


def test_a_bad_image_is_named_before_training(tmp_path: Path) -> None:
    from labkit.workloads.hub_images import hub_images

    for colour in COLOURS:
        for n in range(4):
            picture(tmp_path / colour / f"{n}.png", colour)
    bad = tmp_path / "red" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pytest.importorskip("PIL.Image").fromarray(noise).save(bad)
    for content, reason in (
        (bad.read_bytes()[:900], "cannot be read"),
        (b"no image", "cannot be read: it is not an image"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=rf"the image .*red/2\.png {reason}"):
            hub_images(str(tmp_path), 8)


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_keep_their_content(tmp_path: Path, mode: str) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra 'hub'")
    from labkit.workloads.pixels import rgb

    levels = np.zeros((16, 16), dtype=np.uint8)
    levels[:, 8:] = 255
    levels[:8, :8] = 0 if mode == "1" else 100
    if mode == "I;16":
        image = Image.fromarray(levels.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(levels).convert(mode)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "LA") else "a.png")
    image.save(path)
    with Image.open(path) as stored:
        found = rgb(stored, 16)
    assert found.shape == (16, 16, 3)
    assert found.dtype == np.float32
    assert np.abs(found - levels[:, :, None] / 255).max() < 0.02


@pytest.mark.parametrize(("bits", "noted"), [(12, True), (16, False)])
def test_twelve_bits_in_sixteen_are_noted(tmp_path: Path, bits: int, noted: bool) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra 'hub'")
    from labkit.workloads.hub_images import hub_images

    for place, colour in enumerate(COLOURS):
        (tmp_path / colour).mkdir(exist_ok=True)
        for n in range(3):
            values = np.full((8, 8), (2**bits - 1) // (1 + place), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / colour / f"{n}.png")
    notes = hub_images(str(tmp_path), 8).about.get("notes", [])
    assert any("no pixel is brighter than 16 of 255" in note for note in notes) is noted


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra 'hub'")
    from labkit.workloads.hub_images import hub_images

    for colour in COLOURS:
        for n in range(3):
            (tmp_path / colour).mkdir(exist_ok=True)
            Image.fromarray(np.full((6, 6), 70_000, dtype=np.int32)).convert(mode).save(tmp_path / colour / f"{n}.tiff")
    with pytest.raises(ValueError, match=rf"the image .*blue/\d\.tiff is of mode {mode}, whose values have no range"):
        hub_images(str(tmp_path), 8)


def test_transparent_pixels_show_a_white_ground_and_orientation_is_followed(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra 'hub'")
    from labkit.workloads.pixels import rgb

    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:4, :, 3] = 255
    for convert in (lambda image: image, lambda image: image.quantize(4)):  # a palette with transparent entries
        convert(Image.fromarray(clear)).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as stored:
            found = rgb(stored, 8)
        assert found[0].max() < 0.01
        assert found[7].min() > 0.99
    lying = np.zeros((8, 8, 3), dtype=np.uint8)
    lying[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(lying).save(tmp_path / "b.png", exif=exif)
    with Image.open(tmp_path / "b.png") as stored:
        found = rgb(stored, 8)
    assert found[7].min() == 1.0
    assert found[0].max() == 0.0
