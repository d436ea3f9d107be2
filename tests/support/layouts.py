"""Tiny data sets of noise in published layouts, for tests of sources and trial runs of recipes."""

import gzip
import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

DEVKIT = "ILSVRC2012_devkit_t12/data"
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def noise(seed: int, count: int, *shape: int) -> np.ndarray:
    """(count, *shape) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def put(file: Path, content: bytes | str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def cifar_rows(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Returns (n, 32, 32, 3) images and (n,) labels as CIFAR's binary rows: labels, then red, green and blue plane."""
    columns = [bytes(np.stack([column[k] for column in labels]).astype(np.uint8)) for k in range(len(images))]
    return b"".join(first + image.transpose(2, 0, 1).tobytes() for first, image in zip(columns, images, strict=True))


def stl10_rows(images: np.ndarray) -> bytes:
    """(n, 96, 96, 3) as the files have them: plane by plane, and in a plane column by column."""
    return images.transpose(0, 3, 2, 1).tobytes()


def idx_file(root: Path, name: str, values: np.ndarray, zipped: bool = False) -> Path:
    data = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
    file = root / (f"{name}.gz" if zipped else name)
    put(file, gzip.compress(data) if zipped else data)
    return file


def svhn_file(root: Path, split: str, images: np.ndarray, digits: Sequence[int], compress: bool = True) -> None:
    """(n, 32, 32, 3); the digit 0 has the label 10."""
    stored = np.ascontiguousarray(images.transpose(1, 2, 3, 0))
    savemat(
        root / f"{split}_32x32.mat", {"X": stored, "y": np.array(digits, np.uint8)[:, None]}, do_compression=compress
    )


def dogs_list(file: Path, rows: Sequence[tuple[str, int]]) -> None:
    """Paths and labels from 1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = np.empty((len(rows), 1), object)
    cells[:, 0] = [path for path, _ in rows]
    savemat(
        file,
        {"file_list": cells, "annotation_list": cells, "labels": np.array([[label] for _, label in rows], np.float64)},
    )


def devkit(folder: Path, synsets: Sequence[tuple[int, str, str, int]], truth: str) -> None:
    """Rows of id, WordNet id, words and number of children, and the ids of the validation images, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    savemat(folder / "meta.mat", {"synsets": np.array(list(synsets), fields)[:, None]})
    put(folder / "ILSVRC2012_validation_ground_truth.txt", truth)


def cifar10(root: Path, train: int = 160, test: int = 40) -> None:
    """Writes a set of ten classes as Parquet files."""
    for k, (split, count) in enumerate((("train", train), ("test", test))):
        images = [encoded(image) for image in noise(k, count, 32, 32, 3)]
        pq.write_table(
            pa.table({"image": images, "label": [row % 10 for row in range(count)]}), root / f"{split}-0.parquet"
        )
    put(root / "classes.txt", "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n")


def cifar100(root: Path, train: int = 200, test: int = 100) -> None:
    folder = root / "cifar-100-binary"
    for k, (name, count) in enumerate((("train.bin", train), ("test.bin", test))):
        fine = np.arange(count) % 100
        put(folder / name, cifar_rows(noise(k, count, 32, 32, 3), fine // 5, fine))
    put(folder / "fine_label_names.txt", "".join(f"fine{k}\n" for k in range(100)))
    put(folder / "coarse_label_names.txt", "".join(f"coarse{k}\n" for k in range(20)))


def stl10(root: Path, labelled: int = 60, unlabelled: int = 20, test: int = 40) -> None:
    folder = root / "stl10_binary"
    for k, (name, count) in enumerate((("train", labelled), ("unlabeled", unlabelled), ("test", test))):
        put(folder / f"{name}_X.bin", stl10_rows(noise(k, count, 96, 96, 3)))
        if name != "unlabeled":
            put(folder / f"{name}_y.bin", bytes(1 + row % 10 for row in range(count)))
    put(folder / "class_names.txt", "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck")
    folds = [
        " ".join(str((start + k) % labelled) for k in range(labelled // 2))
        for start in range(0, labelled, labelled // 10)
    ]
    put(folder / "fold_indices.txt", "\n".join(folds) + "\n")


def svhn(root: Path, train: int = 160, test: int = 40) -> None:
    for k, (split, count) in enumerate((("train", train), ("test", test))):
        svhn_file(root, split, noise(k, count, 32, 32, 3), [1 + row % 10 for row in range(count)])


def mnist(root: Path, train: int = 160, test: int = 40) -> None:
    for k, (split, count) in enumerate((("train", train), ("t10k", test))):
        idx_file(root, f"{split}-images-idx3-ubyte", noise(k, count, 28, 28))
        idx_file(root, f"{split}-labels-idx1-ubyte", np.arange(count) % 10)


def imagenet(root: Path, classes: int = 6, train: int = 24, test: int = 18) -> None:
    """With its development kit; images of several sizes."""
    leaves = [f"n{k:08d}" for k in range(1, classes + 1)]
    for k in range(classes * train):
        name = leaves[k % classes]
        put(root / "train" / name / f"{name}_{k}.JPEG", _photo(k))
    for k in range(test):
        put(root / "val" / f"ILSVRC2012_val_{k + 1:08d}.JPEG", _photo(1000 + k))
    truth = "".join(f"{1 + k % classes}\n" for k in range(test))
    devkit(
        root / DEVKIT,
        [*((k, name, name, 0) for k, name in enumerate(leaves, 1)), (classes + 1, "n00000000", "all", classes)],
        truth,
    )


def stanford_dogs(root: Path, breeds: int = 6, train: int = 120, test: int = 30) -> None:
    names = [f"n{k:08d}-breed{k}" for k in range(1, breeds + 1)]
    for split, count, start in (("train", train, 0), ("test", test, train)):
        rows = [(f"{names[k % breeds]}/n{1 + k % breeds:08d}_{start + k}.jpg", 1 + k % breeds) for k in range(count)]
        for k, (path, _) in enumerate(rows):
            put(root / "Images" / path, _photo(start + k))
        dogs_list(root / "lists" / f"{split}_list.mat", rows)


def cub200(root: Path, species: int = 6, train: int = 120, test: int = 30) -> None:
    folder, count = root / "CUB_200_2011", train + test
    names = [f"{k:03d}.Species{k}" for k in range(1, species + 1)]
    paths = [f"{names[k % species]}/{k}.jpg" for k in range(count)]
    for k, path in enumerate(paths):
        put(folder / "images" / path, _photo(k))
    put(folder / "images.txt", "".join(f"{k} {path}\n" for k, path in enumerate(paths, 1)))
    put(folder / "image_class_labels.txt", "".join(f"{k + 1} {1 + k % species}\n" for k in range(count)))
    put(folder / "train_test_split.txt", "".join(f"{k + 1} {int(k < train)}\n" for k in range(count)))
    put(folder / "classes.txt", "".join(f"{k} {name}\n" for k, name in enumerate(names, 1)))


def voc2007(root: Path, train: int = 60, test: int = 20) -> None:
    """Lists of every class, boxes (one of them difficult) and masks."""
    _voc(root / "VOCdevkit" / "VOC2007", {"train": train // 2, "val": train - train // 2, "test": test})


def voc2012(root: Path, train: int = 48, test: int = 20) -> None:
    """Writes the set as it is published: the test images have no annotations, and are not here."""
    _voc(root / "VOCdevkit" / "VOC2012", {"train": train, "val": test})


def _voc(root: Path, sizes: dict[str, int]) -> None:
    numbers = iter(range(1, 10**6))
    lists = {split: [f"{next(numbers):06d}" for _ in range(count)] for split, count in sizes.items()}
    lists["trainval"] = lists["train"] + lists["val"]
    for name in {name for names in lists.values() for name in names}:
        put(root / "JPEGImages" / f"{name}.jpg", _photo(int(name)))
        put(root / "Annotations" / f"{name}.xml", _objects(name))
        put(root / "SegmentationClass" / f"{name}.png", _mask(int(name)))
    for split, names in lists.items():
        for folder in ("Main", "Segmentation"):
            put(root / "ImageSets" / folder / f"{split}.txt", "".join(f"{name}\n" for name in names))
        for k, kind in enumerate(VOC_CLASSES):
            rows = (f"{name} {'1' if k in _shown(int(name)) else '-1':>2}\n" for name in names)
            put(root / "ImageSets" / "Main" / f"{kind}_{split}.txt", "".join(rows))


def _shown(k: int) -> tuple[int, int]:
    """The two classes that an image shows."""
    return k % 20, (k + 7) % 20


def _objects(name: str) -> str:
    boxes = ((8, 8, 40, 40, 0), (30, 20, 70, 60, 0), (50, 4, 60, 20, 1))
    kinds = (*_shown(int(name)), _shown(int(name))[0])
    found = "".join(
        f"<object><name>{VOC_CLASSES[kind]}</name><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for kind, (x1, y1, x2, y2, difficult) in zip(kinds, boxes, strict=True)
    )
    size = "<size><width>80</width><height>64</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{found}</annotation>"


def _mask(k: int) -> bytes:
    """A palette image: 0 background, 1 to 20 the classes, 255 void."""
    first, second = _shown(k)
    mask = np.zeros((64, 80), np.uint8)
    mask[8:40, 8:40], mask[20:60, 40:70], mask[40:42] = 1 + first, 1 + second, 255
    image = Image.fromarray(mask, "P")
    image.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _photo(k: int) -> bytes:
    """A JPEG of 80 x 64 pixels: coarse noise, another for each k."""
    return encoded(np.kron(noise(k, 8, 10, 3), np.ones((8, 8, 1), np.uint8)), "JPEG")


def bccd(root: Path) -> None:
    """VOC's layout with classes of its own, and no lists of them."""
    _like_voc(root, "Main", {"train": 30, "val": 10, "test": 12})
    for file in (root / "Annotations").iterdir():
        names = dict(zip(VOC_CLASSES, ("Platelets", "RBC", "WBC") * 7, strict=False))
        text = file.read_text()
        for theirs, ours in names.items():
            text = text.replace(f"<name>{theirs}</name>", f"<name>{ours}</name>")
        file.write_text(text)


def camvid(root: Path) -> None:
    """VOC's layout of segmentation, and the names of the masks' values."""
    _like_voc(root, "Segmentation", {"train": 30, "val": 10, "test": 12})
    put(root / "classes.txt", "".join(f"class {k}\n" for k in range(21)))


def _like_voc(root: Path, folder: str, sizes: dict[str, int]) -> None:
    numbers = iter(range(1, 10**6))
    for split, count in sizes.items():
        names = [f"{next(numbers):06d}" for _ in range(count)]
        for name in names:
            put(root / "JPEGImages" / f"{name}.jpg", _photo(int(name)))
            put(root / "Annotations" / f"{name}.xml", _objects(name))
            put(root / "SegmentationClass" / f"{name}.png", _mask(int(name)))
        put(root / "ImageSets" / folder / f"{split}.txt", "".join(f"{name}\n" for name in names))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "svhn": svhn,
    "mnist": mnist,
    "imagenet_devkit": imagenet,
    "stanford_dogs": stanford_dogs,
    "cub200": cub200,
    "voc2007": voc2007,
    "voc2012": voc2012,
    "bccd": bccd,
    "camvid": camvid,
}
