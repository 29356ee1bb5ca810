"""Data from files: arrays of every layout, `.npz` archives, folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_lite.data import load_data
from robustbench_lite.data.arrays import images_tensor, labels_tensor

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def archive(folder: Path, **change: np.ndarray | None) -> Path:
    arrays = {
        "x_train": pixels(40, 6, 6),
        "y_train": np.arange(40) % 4,
        "x_test": pixels(9, 6, 6),
        "y_test": np.arange(9) % 3,
        **change,
    }
    path = folder / "mine.npz"
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 7, 6), None),
        ((5, 7, 6), "NHW"),
        ((5, 7, 6, 3), None),
        ((5, 3, 7, 6), None),
        ((5, 3, 7, 3), "NCHW"),
        ((5, 7, 6, 2), "NHWC"),
        ((5, 1, 1, 3), "NHWC"),
    ],
)
def test_every_pixel_arrives_at_its_place(shape: tuple[int, ...], layout: str | None) -> None:
    array = pixels(*shape)
    images = images_tensor(array, layout)
    assert images.dtype == torch.float32
    last = layout == "NHWC" or (layout is None and len(shape) == 4 and shape[3] == 3)
    for _ in range(20):
        n, c, h, w = (int(RNG.integers(k)) for k in images.shape)
        value = array[n, h, w] if len(shape) == 3 else array[n, h, w, c] if last else array[n, c, h, w]
        assert images[n, c, h, w].item() == np.float32(value / 255)  # the correctly rounded quotient


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_stay_as_they_are(dtype: type) -> None:
    array = RNG.random((3, 4, 4)).astype(dtype)
    before = array.copy()
    images = images_tensor(array)
    images += 1
    assert np.array_equal(array, before)  # no shared memory
    assert np.array_equal((images - 1).numpy()[:, 0].round(3), before.astype(np.float32).round(3))


def test_arrays_that_cannot_be_images() -> None:
    for shape in ((5, 3, 6, 3), (5, 6, 7, 8)):
        with pytest.raises(ValueError, match="layout=NHWC or layout=NCHW"):
            images_tensor(pixels(*shape))
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        images_tensor(pixels(5, 784))
    with pytest.raises(ValueError, match="layout NHW means 3 axes"):
        images_tensor(pixels(5, 6, 6, 3), "NHW")
    with pytest.raises(ValueError, match="did you mean 'NHWC'"):
        images_tensor(pixels(5, 6, 6, 3), "nhwc")
    with pytest.raises(TypeError, match="got int64"):
        images_tensor(pixels(5, 6, 6).astype(np.int64))


def test_labels_of_any_integer_type() -> None:
    for dtype in (np.uint8, np.int32, np.int64):
        assert labels_tensor(np.arange(3, dtype=dtype)).dtype == torch.int64
    assert labels_tensor(np.arange(3)[:, None]).tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="integers, got float64"):
        labels_tensor(np.zeros(3))
    with pytest.raises(ValueError, match="one-hot"):
        labels_tensor(np.eye(3, dtype=int))


def test_an_archive_by_its_path(tmp_path: Path) -> None:
    path = archive(tmp_path)
    with np.load(path) as source:
        test = load_data(str(path))
        assert (test.name, test.num_classes, tuple(test.images.shape)) == ("mine", 4, (9, 1, 6, 6))
        assert np.array_equal((test.images[:, 0] * 255).round().numpy(), source["x_test"])
        train, calibration = load_data(str(path), "train"), load_data("npz", "calibration", path=path)
        assert sorted([*train.indices.tolist(), *calibration.indices.tolist()]) == list(range(40))
        assert calibration.labels.bincount().tolist() == [1, 1, 1, 1]
        assert np.array_equal((train.images[:, 0] * 255).round().numpy(), source["x_train"][train.indices])


def test_an_archive_of_test_images_alone(tmp_path: Path) -> None:
    path = archive(tmp_path, x_train=None, y_train=None)
    assert load_data(str(path), num_classes=7).num_classes == 7
    assert load_data(str(path)).num_classes == 3
    with pytest.raises(ValueError, match=r"has no x_train, y_train; it has: x_test, y_test"):
        load_data(str(path), "train")


def test_archives_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data file"):
        load_data(str(tmp_path / "gone.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"is no \.npz archive"):
        load_data(str(tmp_path / "text.npz"))
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is no \.npz archive"):
        load_data(str(tmp_path / "empty.npz"))
    whole = archive(tmp_path).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is no \.npz archive"):
        load_data(str(tmp_path / "half.npz"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="one array, not an archive"):
        load_data(str(tmp_path / "one.npz"))


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = archive(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"x_test.npy") + 100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="an array cannot be read"):
        load_data(str(path))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = archive(tmp_path, x_test=np.array([None] * 9, dtype=object))
    with pytest.raises(ValueError, match="pickled objects never are"):
        load_data(str(path))


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 images but 8 labels"):
        load_data(str(archive(tmp_path, y_test=np.arange(8))))
    with pytest.raises(ValueError, match="divide by 255"):
        load_data(str(archive(tmp_path, x_test=pixels(9, 6, 6).astype(np.float32))))
    with pytest.raises(ValueError, match="data 'mine', split 'test': cannot tell"):
        load_data(str(archive(tmp_path, x_test=pixels(9, 6, 6, 6))))


def paint(path: Path, value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value, 0, 255 - value) if mode == "RGB" else value).save(path)


def gallery(root: Path) -> Path:
    for k, name in enumerate(["ape", "bee", "cat"]):
        for number in range(10):
            paint(root / "train" / name / f"{number}.png", 10 * number + k)
        if name != "bee":  # a class that the test split lacks must not renumber the others
            paint(root / "test" / name / "0.png", 200 + k)
    return root


def test_a_folder_of_images(tmp_path: Path) -> None:
    root = gallery(tmp_path / "zoo")
    test = load_data("image_folder", path=root)
    assert (test.name, test.num_classes, test.labels.tolist()) == ("zoo", 3, [0, 2])
    assert tuple(test.images.shape) == (2, 3, 6, 6)
    assert (test.images[:, :, 0, 0] * 255).round().tolist() == [[200, 0, 55], [202, 0, 53]]
    train, calibration = (load_data("image_folder", split, path=root) for split in ("train", "calibration"))
    assert calibration.labels.tolist() != []
    assert sorted(calibration.labels.tolist()) == [0, 1, 2]
    assert sorted([*train.indices.tolist(), *calibration.indices.tolist()]) == list(range(30))
    assert torch.equal((train.images[:, 0, 0, 0] * 255).round().long() % 10, train.labels)


def test_a_calibration_folder_of_its_own(tmp_path: Path) -> None:
    root = gallery(tmp_path)
    paint(root / "calibration" / "bee" / "0.png", 9)
    assert load_data("image_folder", "calibration", path=root).labels.tolist() == [1]
    assert len(load_data("image_folder", "train", path=root)) == 30


def test_images_of_several_sizes_are_resized_and_cut(tmp_path: Path) -> None:
    root = gallery(tmp_path)
    wide = Image.new("L", (24, 8), 0)
    wide.paste(255, (8, 0, 16, 8))  # the middle third is white: it alone is left
    wide.save(root / "test" / "ape" / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png is 24x8, .*0.png is 6x6: say image_size"):
        load_data("image_folder", path=root)
    data = load_data("image_folder", path=root, image_size=4, channels=1)
    assert tuple(data.images.shape) == (3, 1, 4, 4)
    assert (data.images[1, 0, :, 1:3] == 1).all()


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*test; expected"):
        load_data("image_folder", path=tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        load_data("image_folder", path=tmp_path)
    (tmp_path / "test" / "ape").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        load_data("image_folder", path=tmp_path)
    (tmp_path / "test" / "ape" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_data("image_folder", path=tmp_path)
    with pytest.raises(ValueError, match="channels must be 1"):
        load_data("image_folder", path=tmp_path, channels=2)
