"""Stage: embeddings of the images of a store, as Parquet: the encoder's last map averaged over places. Runs on the driver, with Ray Data.

    embeddings/<split>-00000.parquet ...    id, path, label, embedding; in the order of the ids
    embeddings/manifest.json                what is in which file, and its sha256; written last

A file is whole or absent, so that a killed stage goes on behind the files that are there.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from firstlight.pipeline.config.recipe import Embed
from firstlight.pipeline.data.parquet import parquet_file, parquet_table
from firstlight.pipeline.data.splits import spread
from firstlight.pipeline.data.store import DAMAGE, MANIFEST, file_sha256
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.files import atomic_path, write_json
from firstlight.pipeline.report import figures
from firstlight.pipeline.stages.artifacts import load_encoder
from firstlight.pipeline.stages.inference import Actors, Network, Parts, answers
from firstlight.pipeline.stages.projection import Mapped, project
from firstlight.pipeline.stages.stage import RESULT, Instance
from firstlight.pipeline.tracking.client import Tracking
from firstlight.pipeline.tracking.figures import Album
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.job import to_batch
from firstlight.pipeline.train.metrics import METRICS, SweepProgress, append
from firstlight.tasks.nn.encoders import pooled

ON_DRIVER, WITH_RAY = True, True
FOLDER = "embeddings"
SMALL = 100_000_000  # bytes: embeddings up to these go into MLflow, of others only the manifest
SHOWN = 3000  # points of the map


@dataclass(frozen=True)
class File:
    """The embeddings of some ids of a split, in their order."""

    name: str
    split: str
    ids: np.ndarray


def work(worker: Worker, stage: Embed, instance: Instance) -> None:
    """Leave `embeddings/` and `result.json` in the instance's folder.

    Raises:
        UserError: the store is damaged.
        StageFailed: a task or an actor failed more often than it may.
    """
    folder = instance.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / MANIFEST, *folder.glob(".*.tmp")):  # of a stage that was killed
        stale.unlink(missing_ok=True)
    writer, wanted = _Writer(worker, stage, instance), list(_files(worker, stage))
    failures = worker.recipe.scale.max_failures if worker.options.on_ray else 0
    while not _attempt(writer, wanted, instance, last=failures == 0):
        failures -= 1
    result = _manifest(worker, stage, instance, wanted)
    write_json(folder / MANIFEST, result)
    write_json(instance.folder / RESULT, result)


def _attempt(writer: "_Writer", wanted: list[File], instance: Instance, last: bool) -> bool:
    """Make the files that are missing; whether all are there now. Raises as `work`; of Ray's failures those of the `last` attempt only."""
    waiting = [file for file in wanted if not writer.is_done(file)]
    progress = SweepProgress(instance.folder, sum(len(file.ids) for file in wanted))
    progress.advance(progress.total - sum(len(file.ids) for file in waiting))
    try:
        writer.write(waiting, progress)
    except Exception as error:
        if type(error) in (UserError, StageFailed):  # and not Ray's, which are of these classes too
            raise
        told = _told(error, instance)
        if last or isinstance(told, UserError):
            raise told from error
        append(instance.folder, {"note": f"{told}; going on behind the files that are whole"})
        return False
    return True


def _files(worker: Worker, stage: Embed) -> Iterator[File]:
    for split in stage.splits:
        ids = getattr(worker.splits, split)
        for k in range(0, len(ids), stage.rows_per_file):
            yield File(f"{split}-{k // stage.rows_per_file:05d}.parquet", split, ids[k : k + stage.rows_per_file])


def network(folder: Path, image_size: int, threads: int, gpu: bool) -> Network:
    """(B, S, S, 3) uint8 -> (B, C) float32, by the encoder in `folder`. Called where it is to run."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    encoder = load_encoder(folder, image_size).to(device).eval()

    @torch.no_grad()
    def embed(pixels: np.ndarray) -> np.ndarray:
        ids = np.zeros(len(pixels), np.int64)
        views = to_batch({"id": ids, "label": ids, "views": pixels[:, None]}, device).views
        found: np.ndarray = pooled(encoder(views[0]), "avg").float().cpu().numpy()
        return found

    return embed


class _Writer:
    """Embeds what is missing, and writes it file by file."""

    def __init__(self, worker: Worker, stage: Embed, instance: Instance) -> None:
        assert instance.encoder is not None
        self.worker, self.stage, self.folder = worker, stage, instance.folder / FOLDER
        data, scale = worker.recipe.dataset, worker.recipe.scale
        self.make = partial(network, instance.encoder, data.image_size, scale.threads, scale.gpus_per_worker > 0)
        size = load_encoder(instance.encoder, data.image_size).shapes[-1][0]
        vector = pa.list_(pa.from_numpy_dtype(np.dtype(stage.dtype)), size)
        self.schema = pa.schema(
            [("id", pa.int64()), ("path", pa.string()), ("label", pa.int64()), ("embedding", vector)]
        )

    def is_done(self, file: File) -> bool:
        """Whether it is there, and whole: pages carry checksums."""
        try:
            with parquet_file(self.folder / file.name) as opened:
                table = opened.read(use_threads=False)
        except DAMAGE:
            return False
        return table.schema.equals(self.schema) and np.array_equal(table.column("id").to_numpy(), file.ids)

    def write(self, waiting: list[File], progress: SweepProgress) -> None:
        loader = self.worker.loader([self.worker.recipe.dataset.eval_augment], 0)
        batches = [
            [file.ids[k : k + self.stage.batch_size] for k in range(0, len(file.ids), self.stage.batch_size)]
            for file in waiting
        ]
        parts = Parts(loader, [ids for its in batches for ids in its])
        found = answers(parts, self.make, self._actors(), self.worker.options.prefetch)
        for file, its in zip(waiting, batches, strict=True):
            rows = []
            for ids in its:
                rows.append(next(found))
                progress.advance(len(ids))
            self._put(file, np.concatenate(rows))

    def _actors(self) -> Actors | None:
        scale, options = self.worker.recipe.scale, self.worker.options
        if not options.on_ray:
            return None
        return Actors(
            scale.most, scale.cpus_per_worker, scale.gpus_per_worker, options.tasks * scale.most, options.task_cpus
        )

    def _put(self, file: File, embeddings: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # told below
            embeddings = embeddings.astype(self.stage.dtype)
        wrong = np.flatnonzero(~np.isfinite(embeddings).all(1))
        if len(wrong):
            raise StageFailed(f"the embedding of image {file.ids[wrong[0]]} is not finite in {self.stage.dtype}")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
        columns = [
            pa.array(file.ids),
            pa.array(self.worker.store.paths(file.ids), pa.string()),
            pa.array(self.worker.splits.labels[file.ids]),
            vectors,
        ]
        try:
            with atomic_path(self.folder / file.name) as temporary:
                pq.write_table(
                    pa.table(columns, schema=self.schema),
                    temporary,
                    compression="zstd",
                    use_dictionary=False,
                    write_page_checksum=True,
                )
        except OSError as error:
            raise StageFailed(f"{self.folder / file.name}: cannot be written: {error.strerror or error}") from None


def _manifest(worker: Worker, stage: Embed, instance: Instance, files: list[File]) -> dict[str, Any]:
    assert instance.encoder is not None
    folder, encoder = instance.folder / FOLDER, json.loads((instance.encoder / MANIFEST).read_text("utf-8"))
    rows = []
    for file in files:
        path = folder / file.name
        rows.append(
            {
                "file": file.name,
                "split": file.split,
                "count": len(file.ids),
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        )
    vector = pq.read_schema(folder / files[0].name).field("embedding").type if files else None
    return {
        "format": 1,
        "store": worker.store.hash,
        "encoder": {name: entry["sha256"] for name, entry in encoder["files"].items()},
        "size": vector.list_size if vector else 0,
        "dtype": stage.dtype,
        "counts": {split: len(getattr(worker.splits, split)) for split in stage.splits},
        "files": rows,
    }


@dataclass(frozen=True)
class _Entry:
    """A line of the manifest."""

    file: str
    split: str
    count: int
    bytes: int
    sha256: str


def open_embeddings(folder: Path, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int64 ids and (n, C) embeddings of a split, of all splits in the manifest's order where none is named; every file is checked.

    Raises:
        UserError: a file is missing, damaged or not what the manifest says, or there is no such split; names it.
    """
    manifest, entries = _read_manifest(folder)
    if split is not None and split not in manifest["counts"]:
        raise UserError(f"{folder}: has no split {split!r}; valid: {', '.join(manifest['counts'])}")
    tables = [_checked(folder, entry) for entry in entries if split in (None, entry.split)]
    ids = [table.column("id").to_numpy() for table in tables]
    vectors = [_matrix(table, manifest["size"]) for table in tables]
    empty = np.empty((0, manifest["size"]), manifest["dtype"])
    return np.concatenate([np.empty(0, np.int64), *ids]), np.concatenate([empty, *vectors])


def _read_manifest(folder: Path) -> tuple[dict[str, Any], list[_Entry]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if (manifest["format"], manifest["dtype"] in ("float32", "float16"), isinstance(manifest["size"], int)) != (
            1,
            True,
            True,
        ):
            raise ValueError("another format")
        entries = [_Entry(**entry) for entry in manifest["files"]]
        if any(Path(entry.file).name != entry.file for entry in entries) or not isinstance(manifest["counts"], dict):
            raise ValueError("a file outside of its folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / MANIFEST}: is not a whole manifest of embeddings ({type(error).__name__}: {error})"
        ) from None
    return manifest, entries


def _checked(folder: Path, entry: _Entry) -> pa.Table:
    path = folder / entry.file
    try:
        if file_sha256(path) != entry.sha256:
            raise ValueError("its sha256 is not the one in its manifest")
        table = parquet_table(path, ["id", "embedding"])
        if len(table) != entry.count:
            raise ValueError(f"it has {len(table)} rows, its manifest says {entry.count}")
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path}: is missing or damaged: {reason}; delete {folder.parent} and run again") from None
    return table


def _matrix(table: pa.Table, size: int) -> np.ndarray:
    values: np.ndarray = table.column("embedding").combine_chunks().flatten().to_numpy()
    return values.reshape(-1, size)


def _told(error: BaseException, instance: Instance) -> Exception:
    """One line, of the cause behind what Ray makes of it; without the advice that it adds in a paragraph of its own."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    text = str(cause).strip().partition("\n\n")[0].splitlines()
    if isinstance(cause, UserError):
        return UserError(" ".join(text))
    return StageFailed(f"{instance.label}: {type(cause).__name__}: {text[-1] if text else 'died'}")


def files(stage: Embed, instance: Instance) -> list[tuple[Path, str, str]]:
    """The metrics files that `work` writes: path, label, prefix of their names in MLflow."""
    return [(instance.folder / METRICS, instance.label, "")]


def publish(tracking: Tracking, run_id: str, worker: Worker, stage: Embed, instance: Instance) -> None:
    """The manifest, a map of the embeddings, and the embeddings themselves where they are small, into the MLflow run."""
    folder = instance.folder / FOLDER
    manifest, entries = _read_manifest(folder)
    total = sum(entry.bytes for entry in entries)
    tracking.numbers(
        run_id, {"images": sum(entry.count for entry in entries), "size": manifest["size"], "bytes": total}
    )
    tracking.client.log_artifact(run_id, str(folder / MANIFEST), FOLDER)
    if total <= SMALL:
        for entry in entries:
            tracking.client.log_artifact(run_id, str(folder / entry.file), FOLDER)
    split = next((name for name in ("val", "test", "train") if manifest["counts"].get(name)), None)
    if split:
        mapped, labels, told = _map(worker, stage, folder, split)
        Album(tracking, run_id, instance.folder).add(
            "map", figures.embedding_map(mapped, labels, worker.store.classes), told
        )


def _map(worker: Worker, stage: Embed, folder: Path, split: str) -> tuple[dict[str, Mapped], np.ndarray, str]:
    """Some embeddings of a split on a plane, by title, their labels, and a line that tells of them; of `map_classes` alone where they are given."""
    ids, embeddings = open_embeddings(folder, split)
    labels, classes = worker.splits.labels[ids], worker.store.classes
    shown = (
        np.flatnonzero(np.isin(labels, [classes.index(name) for name in stage.map_classes]))
        if stage.map_classes
        else np.arange(len(ids))
    )
    chosen = spread(shown, SHOWN)
    title = f"embeddings: {len(chosen):,} of {len(ids):,} {split} images"
    how = "at their first two principal components" if stage.map == "pca" else "by t-SNE"
    return {title: project(embeddings[chosen], stage.map)}, labels[chosen], f"{title}, {how}"
