"""Stanford Dogs: Images/<wnid>-<breed>/*.jpg, with splits and labels in lists/train_list.mat and test_list.mat."""

from dataclasses import dataclass
from pathlib import Path

from firstlight.pipeline.data.sources.folder import FolderSource
from firstlight.pipeline.data.sources.published import matlab
from firstlight.pipeline.data.sources.published.image_lists import ImageListing, ListedImage, make_listed_source
from firstlight.pipeline.data.sources.published.layout import check_relative_path, require_files
from firstlight.pipeline.data.sources.source import SourceOptions, open_local_root
from firstlight.pipeline.errors import UserError

DOGS_LISTS = ("train_list.mat", "test_list.mat")


@dataclass(frozen=True)
class StanfordDogs(FolderSource):
    kind = "stanford_dogs"


def open_stanford_dogs(dataset: SourceOptions) -> StanfordDogs:
    """Lists the images. The lists are in lists/ or in the root.

    Classes are the folders, for example n02085620-Chihuahua, in the order of their labels.

    Raises:
        UserError: a list is missing or damaged, or its labels and folders do not agree.
    """
    root = open_local_root(dataset)
    below = "lists/" if (root / "lists").is_dir() else ""
    names = tuple(below + name for name in DOGS_LISTS)
    require_files(root, "Images", *names)
    classes: dict[int, str] = {}
    train, test = (_read_image_list(root / name, classes, known=k > 0) for k, name in enumerate(names))
    class_names = tuple(classes[k] for k in range(len(classes)))
    return make_listed_source(StanfordDogs, ImageListing(root, names, class_names, train, test), dataset)


def _read_image_list(file: Path, classes: dict[int, str], known: bool) -> list[ListedImage]:
    """Returns the images of a list. The training list (`known` is False) defines the classes, a folder for each label.

    Raises:
        UserError: a label has two folders or is out of range, or no image has a label below the largest one.
    """
    paths = [str(cell.item()) if cell.size == 1 else "" for cell in matlab.read_variable(file, "file_list").reshape(-1)]
    labels = matlab.read_integers(file, "labels").tolist()
    if len(labels) != len(paths):
        raise UserError(f"{file}: has {len(labels)} labels for {len(paths)} files")
    images = []
    for row, (path, label) in enumerate(zip(paths, labels, strict=True)):
        path = check_relative_path(path, f"{file}: row {row}")
        folder = path.partition("/")[0]
        if not known:
            classes.setdefault(label - 1, folder)
        if classes.get(label - 1) != folder:
            problem = (
                f"stands for {classes[label - 1]!r}"
                if label - 1 in classes
                else f"is out of range; valid: 1 to {len(classes)}"
            )
            raise UserError(f"{file}: row {row}: label {label} of {path!r} {problem}")
        images.append(ListedImage(f"Images/{path}", label - 1))
    missing = next((k for k in range(len(classes)) if k not in classes), None)
    if missing is not None:
        raise UserError(
            f"{file}: no image has label {missing + 1}, yet one has label {max(classes) + 1}; "
            "valid: 1 to the number of classes"
        )
    return images
