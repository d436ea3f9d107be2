"""Views of images outside of trainings, kept in this process: evaluations decode each image once."""

from collections.abc import Iterator

import numpy as np

from firstlight.pipeline.data.loader import Arrays, Loader
from firstlight.pipeline.data.stream import EvalOrder, LoadingOptions, stream_batches
from firstlight.tasks.collective import rank, world_size


class HeldViews:
    """Views of images outside of trainings, which are always the same ones: kept in this process once they are made.

    They are evaluated again for every epoch, learning rate, arm and seed of a stage, and, where a run has no workers of
    its own, for the stages after it.
    """

    def __init__(self) -> None:
        # The rows of a batch by id, by what decides the pixels of a loader.
        self._rows: dict[str, dict[int, Arrays]] = {}

    def iterate_batches(
        self, loader: Loader, ids: np.ndarray, batch_size: int, options: LoadingOptions
    ) -> Iterator[Arrays]:
        """Yields this worker's part of `ids`, in order, as `stream_batches` gives it.

        If all views of this loader do not fit into `options.held_view_bytes`, none are kept.
        """
        own = EvalOrder(ids, batch_size, rank(), world_size()).own_ids
        if loader.targets is not None or not self._has_room(loader, own, options.held_view_bytes):
            yield from stream_batches(loader, EvalOrder(ids, batch_size, rank(), world_size()), batch_size, options)
            return
        rows = self._rows[_describe_pixels(loader)]
        missing = np.array([image for image in dict.fromkeys(own.tolist()) if image not in rows], np.int64)
        stream = stream_batches(loader, EvalOrder(missing, batch_size, 0, 1), batch_size, options)
        for start in range(0, len(own), batch_size):
            wanted = own[start : start + batch_size].tolist()
            while not all(image in rows for image in wanted):
                _keep_view_rows(rows, next(stream))
            yield {name: np.stack([rows[image][name] for image in wanted]) for name in rows[wanted[0]]}

    def _has_room(self, loader: Loader, ids: np.ndarray, limit: int) -> bool:
        """Returns True if the views of `ids` can be kept. The views of other loaders are dropped if that makes room."""
        key = _describe_pixels(loader)
        known = self._rows.get(key, {})
        total = sum(image not in known for image in ids.tolist()) + len(known)
        if total * loader.row_bytes > limit:
            return False
        if self._count_bytes(besides=key) + total * loader.row_bytes > limit:
            self._rows = {key: known}
        self._rows.setdefault(key, known)
        return True

    def _count_bytes(self, besides: str) -> int:
        views = [row for key, rows in self._rows.items() if key != besides for row in rows.values()]
        return sum(array.nbytes for row in views for array in row.values())

    def clear(self) -> None:
        """Forgets all views."""
        self._rows = {}


# The held views of this process.
held_views = HeldViews()


def _describe_pixels(loader: Loader) -> str:
    """Returns what decides the pixels of a loader outside of a training."""
    sizes = loader.view_sizes or loader.size
    return f"{loader.store.path} {loader.store.hash} {loader.ops} {sizes} {loader.seed} {loader.max_pixels}"


def _keep_view_rows(rows: dict[int, Arrays], arrays: Arrays) -> None:
    for place, image in enumerate(arrays["id"].tolist()):
        rows[image] = {name: values[place].copy() for name, values in arrays.items()}
