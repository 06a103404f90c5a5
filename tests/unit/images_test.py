"""Images: where they come from, how they are split and normalised, and what is said of files that are no images."""

import gzip
import io
import json
import shutil
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import AugmentConfig, ComponentConfig, DataConfig, DataSource, OnBad
from bigtrain.data.prepare import image_sources
from bigtrain.data.prepare.corpus import prepare_components
from bigtrain.data.prepare.images import prepare_images
from bigtrain.data.read.images import Augmentation, ImageSet
from bigtrain.data.streams import open_streams
from bigtrain.errors import BigtrainError, ConfigError, DataError
from bigtrain.tasks.classification import Classification, Inputs
from bigtrain.telemetry.history import History
from bigtrain.telemetry.report import render

Image = pytest.importorskip("PIL.Image")
RANDOM = np.random.default_rng(0)


def save(path, pixels=None, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (8, 8), dtype=np.uint8) if pixels is None else pixels
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    (image.convert(mode) if mode else image).save(path, **options)


def opened(path, root, seed=0, **settings):
    config = DataConfig(source=DataSource.images, path=str(path), root=str(root), **settings)
    return ImageSet(prepare_images(config, progress=False), Augmentation(config.augment, seed))


def raw_of(side):
    rows = np.arange(len(side))
    images = side._images
    return side.gather(rows, rows)["pixels"] * np.moveaxis(images.deviation, -1, 1) + np.moveaxis(images.mean, -1, 1)


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 images, 8x8 in grey; five of them there twice."""
    for name in ("cat", "dog"):
        for number in range(20):
            save(tmp_path / "folder" / name / f"{number:02}.png")
    for number in range(5):
        (tmp_path / "folder" / "dog" / f"copy{number}.png").write_bytes(
            (tmp_path / "folder" / "dog" / f"{number:02}.png").read_bytes()
        )
    return tmp_path / "folder"


def test_a_directory_per_class_is_split_by_content_and_normalised_by_its_training_side(folder, tmp_path):
    images = opened(folder, tmp_path / "data", validation_fraction=0.3)
    train, held_out = images.train(), images.validation()
    assert images.index.label_names == ["cat", "dog"] and len(train) + len(held_out) == 45 and len(held_out) > 5
    sides = [{image.tobytes() for image in raw_of(side).round().astype(np.uint8)} for side in (train, held_out)]
    assert not sides[0] & sides[1] and sum(map(len, sides)) == 40, "equal images are on one side"
    pixels = raw_of(train)
    assert images.index.mean == pytest.approx([pixels.mean()]) and images.index.deviation == pytest.approx(
        [pixels.std()]
    )
    drawn = train.gather(np.arange(len(train)), np.arange(len(train)))
    assert abs(drawn["pixels"].mean()) < 1e-5 and drawn["pixels"].dtype == np.float32
    assert sorted(np.concatenate([drawn["labels"], [images.labels[r] for r in images._rows["validation"]]])) == sorted(
        images.labels
    )
    again = opened(folder, tmp_path / "elsewhere", validation_fraction=0.3)
    assert again.index == images.index
    save(folder / "cat" / "00.png")
    assert opened(folder, tmp_path / "data", validation_fraction=0.3).index.fingerprint != images.index.fingerprint


def test_a_test_set_of_its_own_is_the_held_out_side_and_copies_in_it_are_counted(tmp_path):
    for side, count in (("train", 6), ("test", 3)):
        for number in range(count):
            save(tmp_path / "in" / side / "ab"[number % 2] / f"{number}.png")
    (tmp_path / "in/test/a/copy.png").write_bytes((tmp_path / "in/train/a/0.png").read_bytes())
    images = opened(tmp_path / "in", tmp_path)
    assert (len(images.train()), len(images.validation()), images.index.num_in_both) == (6, 4, 1)
    (tmp_path / "in/test/c").mkdir()
    save(tmp_path / "in/test/c/1.png")
    with pytest.raises(DataError, match="test/c: no class of the training images: a, b"):
        opened(tmp_path / "in", tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_files_are_read_or_named(ending, tmp_path):
    images, labels = RANDOM.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30, dtype=np.uint8) % 10
    for side in ("train", "t10k"):
        write_idx(tmp_path / f"{side}-images-idx3-ubyte{ending}", images)
        write_idx(tmp_path / f"{side}-labels-idx1-ubyte{ending}", labels)
    found = opened(tmp_path, tmp_path / "data")
    assert np.array_equal(found.pixels[:30, :, :, 0], images) and np.array_equal(found.labels[:30], labels)
    assert len(found.index.label_names) == 10 and found.index.num_in_both == 30
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*fetch it again"):
        opened(tmp_path, tmp_path / "data")
    path.write_bytes(b"not an image at all")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*(no idx file|to its end)"):
        opened(tmp_path, tmp_path / "data")
    path.write_bytes(whole)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", labels[:7])
    with pytest.raises(DataError, match="7 labels for 30 images"):
        opened(tmp_path, tmp_path / "data")


def test_parquet_of_the_hub_has_the_names_of_its_labels(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def encoded(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    colours = RANDOM.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    features = {"img": {"_type": "Image"}, "label": {"names": ["ship", "frog"], "_type": "ClassLabel"}}
    for name, rows in (("train-00000-of-00001", range(6)), ("test-00000-of-00001", range(6, 8))):
        table = pa.table({"img": [encoded(colours[i]) for i in rows], "label": [i % 2 for i in rows]})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
    images = opened(tmp_path, tmp_path / "data")
    assert images.index.label_names == ["ship", "frog"] and np.array_equal(images.pixels, colours)
    assert len(images.validation()) == 2 and images.train().gather(np.array([1]), np.array([0]))["labels"] == [1]
    assert opened(tmp_path, tmp_path / "data", image_channels=1, image_size=8).pixels.shape == (8, 8, 8, 1)
    lists = pa.table({"img": [encoded(colours[0])], "label": [[0, 1]]})
    pq.write_table(lists, tmp_path / "train-00001-of-00001.parquet")
    told = "labels are lists in train-00001-of-00001.parquet and numbers in t.*parquet; write all alike"
    with pytest.raises(DataError, match=told):
        opened(tmp_path, tmp_path / "data")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train-00001-of-00001.parquet")
    with pytest.raises(DataError, match="its columns are text; data=images reads an image with 'bytes'"):
        opened(tmp_path, tmp_path / "data")


def test_images_are_fetched_from_a_url_once(tmp_path, capfd):
    fsspec = pytest.importorskip("fsspec")
    colours = RANDOM.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for number, pixels in enumerate(colours):
        save(tmp_path / "in" / "ab"[number % 2] / f"{number}.png", pixels)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "in"), "/pictures", recursive=True)
    right = opened(tmp_path / "in", tmp_path / "data")
    for _ in range(2):
        found = opened("memory://pictures", tmp_path / "data")
        assert np.array_equal(found.pixels, right.pixels) and found.index.label_names == ["a", "b"]
    assert found.index.fingerprint == right.index.fingerprint and len(list((tmp_path / "data").glob("fetched-*"))) == 1
    with pytest.raises(DataError, match=r"memory://nothing: there is no such file or directory"):
        opened("memory://nothing", tmp_path / "data")
    with pytest.raises(DataError, match=r"data.path=odd://x: cannot be fetched"):
        opened("odd://x", tmp_path / "data")


def test_an_image_may_have_several_labels(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [[], ["cat"], ["cat", "dog"], ["dog", "owl"], ["owl"], []]
    right = np.array([[name in own for name in ("cat", "dog", "owl")] for own in lists])
    grey = RANDOM.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for number, pixels in enumerate(grey):
        save(tmp_path / "files" / f"{number}.png", pixels)
    table = tmp_path / "files" / "metadata.jsonl"
    lines = [json.dumps({"file_name": f"{i}.png", "labels": own}) for i, own in enumerate(lists)]
    table.write_text("\n".join(lines))
    images = [{"bytes": (tmp_path / "files" / f"{i}.png").read_bytes()} for i in range(6)]
    numbers = [[["cat", "dog", "owl"].index(name) for name in own] for own in lists]
    features = {"image": {}, "labels": {"feature": {"names": ["cat", "dog", "owl"]}, "_type": "List"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "table").mkdir()
    rows = pa.table({"image": images, "labels": pa.array(numbers, pa.list_(pa.int64()))})
    pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / "table" / "train.parquet")
    for name in ("files", "table"):
        found = opened(tmp_path / name, tmp_path / "data")
        assert np.array_equal(found.labels, right) and found.index.label_names == ["cat", "dog", "owl"]
        assert np.array_equal(found.pixels[..., 0], grey)
    table.write_text("\n".join(json.dumps({"file_name": f"{i}.png", "label": i % 2}) for i in range(6)))
    found = opened(tmp_path / "files", tmp_path / "data")
    assert found.labels.tolist() == [0, 1] * 3 and found.index.label_names == ["0", "1"]
    for line, told in (
        ('{"file_name": "9.png", "label": 1}', r"jsonl:7: there is no file"),
        ('{"label": 1}', r'jsonl:7: not as {"file_name"'),
        ('{"file_name": "1.png", "label": []}', "some labels are lists and others are not"),
    ):
        table.write_text("\n".join([*(f'{{"file_name": "{i}.png", "label": {i}}}' for i in range(6)), line]))
        with pytest.raises(DataError, match=told):
            opened(tmp_path / "files", tmp_path / "data")


def test_kinds_of_files_are_read_right_or_named(tmp_path):
    grey = RANDOM.integers(0, 256, (8, 8), dtype=np.uint8)
    colour = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    shown = np.dstack([colour, np.where(np.arange(64).reshape(8, 8) % 2, 255, 0).astype(np.uint8)])
    place = tmp_path / "in" / "a"
    save(place / "0.png", colour)
    save(place / "1.png", grey)
    save(place / "2.png", (grey.astype(np.uint16) << 8) + 17)
    save(place / "3.png", shown)
    save(place / "4.png", Image.fromarray(colour).quantize(256))
    save(place / "5.jpg", Image.fromarray(colour).resize((8, 8)).convert("CMYK"), quality=100, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(place / "6.png", colour, exif=exif)
    pixels = opened(tmp_path / "in", tmp_path, validation_fraction=0.01).pixels
    assert np.array_equal(pixels[0], colour) and np.array_equal(pixels[1], np.repeat(grey[:, :, None], 3, 2))
    assert np.array_equal(pixels[2], pixels[1]), "16 bits"
    assert np.array_equal(pixels[3], np.where(shown[:, :, 3:] > 0, colour, 255)), "alpha"
    assert np.array_equal(pixels[4], colour), "palette"
    assert np.abs(pixels[5].astype(int) - colour).mean() < 20, "CMYK"
    assert np.array_equal(pixels[6], np.rot90(colour, -1)), "EXIF"


def animation():
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (0, 255)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def png(size):
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (size, size), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"text", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (png(8)[:-45], "cannot be decoded"),
        (animation(), "2 frames; an image to train on has one"),
        (png(9), "9x9 pixels, the first image has 8x8; set data.image_size"),
    ],
)
def test_a_file_that_is_no_image_of_the_set_is_named_or_left_out(content, told, folder, tmp_path):
    (folder / "dog" / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=told) as error:
        opened(folder, tmp_path / "data")
    assert "dog/x.png" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; or leave such out: data.on_bad_row=skip")
    left = opened(folder, tmp_path / "data", on_bad_row=OnBad.skip)
    assert left.index.num_left_out == 1 and len(left.train()) + len(left.validation()) == 45


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    def told(path, kind=DataError, **settings):
        with pytest.raises(kind) as error:
            opened(path, tmp_path / "data", **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no such file or directory" in told(tmp_path / "nowhere")
    assert "must be package:digits or package:fashion_mnist" in told("package:mnist")
    monkeypatch.setattr(image_sources, "find_spec", lambda name: None)
    monkeypatch.setattr(image_sources, "_FASHION", tmp_path / "nowhere")
    assert "pip install scikit-learn" in told("package:digits")
    assert "apt-get install dataset-fashion-mnist" in told("package:fashion_mnist")
    (folder / "README.txt").write_text("cats and dogs")
    assert "README.txt: beside the directories of classes" in told(folder)
    (folder / "README.txt").unlink()
    (folder / "bird").mkdir()
    assert "bird: a class without an image" in told(folder)
    (folder / "bird" / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert "bird/a.png: a link to a file that is not there" in told(folder)
    (folder / "bird" / "a.png").unlink()
    save(folder / "bird" / "1.png", np.zeros((3, 5), dtype=np.uint8))
    assert "bird/1.png: 5x3 pixels; set data.image_size, a square" in told(folder)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr("bigtrain.config.packages.find_spec", lambda name: None)
    assert "pip install 'bigtrain[images]'" in told(folder, ConfigError)


def test_images_that_do_not_fit_the_disk_are_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"cannot be written: decoded images take 0\.0 MiB, and fewer are free"):
        opened(folder, tmp_path / "full")


def test_fewer_labels_than_classes_are_refused(folder, tmp_path):
    config = DataConfig(source=DataSource.images, path=str(folder), root=str(tmp_path))
    opening = {"vocab_size": 1, "seed": 0, "global_batch_size": 4}
    directories = {"data": prepare_images(config, progress=False)}
    objective = Classification(inputs=Inputs.pixels, num_labels=2)
    streams = open_streams(config, directories, objective=objective, **opening)
    assert streams["train"].label_names == ["cat", "dog"]
    save(folder / "bird" / "1.png")
    directories = {"data": prepare_images(config, progress=False)}
    with pytest.raises(BigtrainError, match=r"has 3 classes \(bird, cat, dog\), but task.num_labels=2"):
        open_streams(config, directories, objective=objective, **opening)


def test_a_mixture_of_images_has_one_set_of_labels_and_is_normalised_by_its_first_images(folder, tmp_path):
    def train_of(**settings):
        config = DataConfig(source=DataSource.images, root=str(tmp_path / "data"), **settings)
        directories = dict(prepare_components(config, progress=False))
        objective = Classification(inputs=Inputs.pixels, num_labels=2)
        opening = {"vocab_size": 1, "seed": 0, "global_batch_size": 4}
        return open_streams(config, directories, objective=objective, **opening)["train"]

    for name in ("cat", "dog"):
        for number in range(20):
            save(tmp_path / "dark" / name / f"{number:02}.png", np.full((8, 8), number, dtype=np.uint8))
            save(tmp_path / "pets" / {"cat": "dog", "dog": "eel"}[name] / f"{number:02}.png")
    parts = {"all": ComponentConfig(path=str(folder)), "dark": ComponentConfig(path=str(tmp_path / "dark"))}
    alone, mixed = train_of(path=str(folder)), train_of(mixture=parts)
    assert mixed.label_names == ["cat", "dog"] and mixed.facts["mean"] == alone.facts["mean"]
    seen = mixed.gather(np.arange(mixed.num_samples))["pixels"] * mixed.facts["deviation"][0] + mixed.facts["mean"][0]
    assert (seen.round() < 20).flatten(1).all(dim=1).sum() >= 15  # the dark ones are dark to the network, too
    parts["dark"] = ComponentConfig(path=str(tmp_path / "pets"))
    with pytest.raises(
        DataError, match="dark has the labels dog, eel, all has cat, dog; a mixture needs the same ones"
    ):
        train_of(mixture=parts)


# Augmentation


def augmented(images, positions, seed=3, **settings):
    return Augmentation(AugmentConfig(**settings), seed)(images, np.asarray(positions))


def test_augmentation_is_a_function_of_seed_and_position():
    images = RANDOM.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    settings = {"crop_padding": 2, "flip": True, "rotation": 20.0}
    whole = augmented(images, np.arange(50), **settings)
    parts = [augmented(images[[i]], [i], **settings) for i in range(50)]
    assert np.allclose(whole, np.concatenate(parts), atol=1e-3)
    assert not np.allclose(whole, augmented(images, np.arange(50) + 50, **settings), atol=1)
    assert not np.allclose(whole, augmented(images, np.arange(50), seed=4, **settings), atol=1)
    assert np.array_equal(augmented(images, np.arange(50)), images), "nothing by default"


def test_crops_are_moved_images_and_flips_are_mirrored_ones():
    images = RANDOM.integers(1, 256, (400, 6, 6, 1), dtype=np.uint8)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for image, crop in zip(padded, augmented(images, np.arange(400), crop_padding=1, flip=True), strict=True):
        places = {
            (y, x, flip): image[y : y + 6, x : x + 6][:, :: -1 if flip else 1]
            for y in range(3)
            for x in range(3)
            for flip in (False, True)
        }
        (place,) = [key for key, pixels in places.items() if np.array_equal(pixels, crop)]
        seen.add(place)
    assert len(seen) == 18
    once = np.zeros((1, 9, 9, 1), dtype=np.uint8)
    once[0, 4, 4], once[0, 4, 8] = 200, 100
    turned = np.stack([augmented(once, [i], rotation=90.0)[0, :, :, 0] for i in range(40)])
    assert (
        np.allclose(turned[:, 4, 4], 200, atol=1)
        and len({tuple(np.argwhere(t == t[t < 150].max())[0]) for t in turned}) > 5
    )


def test_mixup_blends_pixels_as_it_shares_the_loss(folder, tmp_path):
    images = opened(folder, tmp_path, augment=AugmentConfig(mixup=0.4))
    train, plain = images.train(), opened(folder, tmp_path).train()
    rows, positions = np.arange(len(train)), np.arange(len(train)) + 1000
    columns = train.gather(rows, positions)
    partners, _, shares = train.augmentation.partners(positions, len(train))
    own, other = plain.gather(rows, positions), plain.gather(partners, positions)
    expected = shares[:, None, None, None] * own["pixels"] + (1 - shares[:, None, None, None]) * other["pixels"]
    assert np.allclose(columns["pixels"], expected, atol=1e-4)
    assert np.array_equal(columns["mixed_labels"], other["labels"]) and np.array_equal(columns["labels"], own["labels"])
    assert "shares" not in images.validation().gather(rows[:1], positions[:1])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixup_are_drawn_from_the_beta_distribution(alpha):
    _, places, shares = Augmentation(AugmentConfig(mixup=alpha), 0).partners(np.arange(200_000), 10)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(a, a), around 1/2
    assert ((shares - 0.5) ** 2).mean() == pytest.approx(variance, rel=0.02)
    assert shares.min() >= 0.5 and shares.max() <= 1 and places.min() >= 0


def test_a_warning_is_not_all_that_is_said_of_a_huge_image(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with warnings.catch_warnings(), pytest.raises(DataError, match="cannot be decoded"):
        warnings.simplefilter("ignore")
        opened(folder, tmp_path)


def test_of_many_classes_the_report_has_the_pairs_that_are_confused_most_and_escapes_names():
    counts = np.eye(40, dtype=int) * 9
    counts[3, 7], counts[7, 3] = 5, 2
    facts = {"step": 4, "labels": [f"<{i}>" for i in range(40)], "confusion": counts.tolist(), "wrong": []}
    run = {"name": "run", "directory": Path("run"), "records": [{"step": 4}], "events": [], "state": "finished"}
    page = render([History(**run, classification=facts)])
    assert "360 of 367 held-out samples right" in page and page.count("&lt;3&gt;") == page.count("&lt;7&gt;") == 2
    assert page.index("<td>&lt;3&gt;</td><td>&lt;7&gt;</td><td>5</td>") < page.index("<td>2</td>")
    assert "held-out samples" not in render([History(**run)])
