"""The stage `embed`: embeddings of the images of a store as Parquet files. It runs on the driver, with Ray Data.

An embedding is the mean of the encoder's last map. Where an earlier stage of the run has kept it with the same bits
(`kept_features`), it is not computed again.

    embeddings/<split>-00000.parquet ...    id, path, label, embedding, in the order of the ids
    embeddings/manifest.json                the content and the sha256 of each file; written last

A file is whole or absent, so a stage that was killed continues after its last whole file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.manifest import DAMAGE_ERRORS, MANIFEST_FILE, file_sha256
from firstlight.pipeline.data.mirror.places import TravellingPath
from firstlight.pipeline.data.parquet import open_parquet_file, read_parquet_table
from firstlight.pipeline.data.ray_data import ActorPool, NetworkFunction, TaskPool
from firstlight.pipeline.errors import StageFailed, UserError, describe_os_error, one_line
from firstlight.pipeline.files import atomic_path
from firstlight.pipeline.records import Count, HexDigest, RecordShape, parse_record, write_sealed_json
from firstlight.pipeline.stages.artifacts.encoder_folder import load_encoder
from firstlight.pipeline.stages.checks import check_class_names
from firstlight.pipeline.stages.features.feature_uses import takes_kept_embeddings
from firstlight.pipeline.stages.features.frozen_features import prepare_for_inference
from firstlight.pipeline.stages.features.inference import ImageBatches, predict_batches
from firstlight.pipeline.stages.features.kept_features import group_places, has_kept, hash_features, read_kept
from firstlight.pipeline.stages.sections.embed import Embed
from firstlight.pipeline.stages.shared_work import hash_weights
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.stage_kind import RecipeContext, StageKind, StageOutput, StreamedBatch
from firstlight.pipeline.train.accelerator.cpu import set_up_cpu
from firstlight.pipeline.train.backward_pass import find_autocast
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.folder_manifest import read_verified
from firstlight.pipeline.train.metrics import PassProgress, append_row
from firstlight.pipeline.train.training_job import to_batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.feature_extractor import FeatureExtractor

EMBEDDINGS_FOLDER = "embeddings"


@dataclass(frozen=True)
class EmbeddingFile:
    """The part of a split whose embeddings one file holds, in the order of the ids."""

    name: str
    split: str
    ids: np.ndarray


def _attempt_files(
    writer: "_EmbeddingWriter", wanted: list[EmbeddingFile], instance: StageInstance, last: bool
) -> bool:
    """Writes the files that are missing, and returns True if all of them exist now.

    Raises:
        UserError, StageFailed: as `EmbedStage.run`; a failure inside Ray only if this is the `last` attempt.
    """
    waiting = [file for file in wanted if not writer.is_done(file)]
    progress = PassProgress(instance.folder, sum(len(file.ids) for file in wanted))
    progress.add_images(progress.total - sum(len(file.ids) for file in waiting))
    try:
        writer.write_files(waiting, progress)
    except Exception as error:
        if type(error) in (UserError, StageFailed):  # and not Ray's, which are of these classes too
            raise
        explained = _unwrap_ray_error(error, instance)
        if last or isinstance(explained, UserError):
            raise explained from error
        append_row(instance.folder, {"note": f"{explained}; it continues after the files that are whole"})
        return False
    return True


def _plan_files(context: StageContext, stage: Embed) -> Iterator[EmbeddingFile]:
    for split in stage.splits:
        ids = getattr(context.splits, split)
        for k in range(0, len(ids), stage.rows_per_file):
            yield EmbeddingFile(
                f"{split}-{k // stage.rows_per_file:05d}.parquet", split, ids[k : k + stage.rows_per_file]
            )


def _build_extractor(encoder: Encoder, precision: str, device: torch.device) -> FeatureExtractor:
    return FeatureExtractor(encoder, None, (-1,), "avg", find_autocast(precision, device))


def _find_device(gpu: bool) -> torch.device:
    return torch.device("cuda" if gpu else "cpu")


def build_network(folder: TravellingPath, image_size: int, threads: int, gpu: bool, precision: str) -> NetworkFunction:
    """Builds a function from (B, S, S, 3) uint8 to (B, C) float32 with the encoder in `folder`, in the process that
    calls it.
    """
    set_up_cpu(threads)
    device = _find_device(gpu)
    encoder = load_encoder(folder.fetch(), image_size)
    network = prepare_for_inference(_build_extractor(encoder, precision, device), device)

    @torch.no_grad()
    def embed(pixels: np.ndarray) -> np.ndarray:
        unused = np.zeros(len(pixels), np.int64)
        arrays = {"id": unused, "label": unused, "pass": unused, "views": pixels[:, None]}
        (features,) = network(to_batch(arrays, device).views[0])
        found: np.ndarray = features.cpu().numpy()
        return found

    return embed


def _read_kept_splits(
    context: StageContext, stage: Embed, instance: StageInstance, encoder: Encoder
) -> dict[str, np.ndarray]:
    """Returns the (n, C) embeddings of the splits that other stages of the run have computed in the same batches.

    A file begins a new batch, so that the batches of several files are the same only if each has whole ones.
    """
    splits, run, found = context.splits, instance.folder.parent, dict[str, np.ndarray]()
    if not has_kept(run) or not takes_kept_embeddings(context.recipe.scale):
        return found
    device = _find_device(context.recipe.scale.worker_gpus > 0)
    network = _build_extractor(encoder, stage.precision, device)
    weights = hash_weights(network)
    for split in stage.splits:
        ids = getattr(splits, split)
        is_aligned = len(ids) <= stage.rows_per_file or stage.rows_per_file % stage.batch_size == 0
        if is_aligned and len(group_places(splits, ids)) == 1:
            (key,) = hash_features(context, network, weights, ids, stage.batch_size, device)
            rows = read_kept(run, key)
            found |= {} if rows is None else {split: rows.numpy()}
    return found


class _EmbeddingWriter:
    """Embeds the images of missing files, and writes one file after another."""

    def __init__(self, context: StageContext, stage: Embed, instance: StageInstance) -> None:
        assert instance.encoder is not None
        self.context, self.stage, self.folder = context, stage, instance.folder / EMBEDDINGS_FOLDER
        data, scale = context.recipe.dataset, context.recipe.scale
        folder, on_gpu = TravellingPath(instance.encoder), scale.worker_gpus > 0
        self.make = partial(build_network, folder, data.image_size, scale.worker_threads, on_gpu, stage.precision)
        encoder = load_encoder(instance.encoder, data.image_size)
        vector = pa.list_(pa.from_numpy_dtype(np.dtype(stage.dtype)), encoder.shapes[-1][0])
        self.schema = pa.schema(
            [("id", pa.int64()), ("path", pa.string()), ("label", pa.int64()), ("embedding", vector)]
        )
        # The features that other stages of the run have kept, by split.
        self.kept = _read_kept_splits(context, stage, instance, encoder) if instance.facts else {}

    def is_done(self, file: EmbeddingFile) -> bool:
        """Returns True if a file exists and is whole: its pages carry checksums."""
        try:
            with open_parquet_file(self.folder / file.name) as opened:
                table = opened.read(use_threads=False)
        except DAMAGE_ERRORS:
            return False
        return table.schema.equals(self.schema) and np.array_equal(table.column("id").to_numpy(), file.ids)

    def write_files(self, waiting: list[EmbeddingFile], progress: PassProgress) -> None:
        for file in waiting:
            if file.split in self.kept:
                places = np.searchsorted(getattr(self.context.splits, file.split), file.ids)
                self._write_file(file, self.kept[file.split][places])
                progress.add_images(len(file.ids))
        waiting = [file for file in waiting if file.split not in self.kept]
        loader = self.context.build_loader([self.context.recipe.dataset.eval_augment], 0)
        batches = [
            [file.ids[k : k + self.stage.batch_size] for k in range(0, len(file.ids), self.stage.batch_size)]
            for file in waiting
        ]
        parts = ImageBatches(loader, [ids for its in batches for ids in its])
        options = self.context.options
        found = predict_batches(parts, self.make, self._actor_pool(), options.prefetch, options.tasks)
        for file, its in zip(waiting, batches, strict=True):
            rows = []
            for ids in its:
                rows.append(next(found))
                progress.add_images(len(ids))
            self._write_file(file, np.concatenate(rows))

    def _actor_pool(self) -> ActorPool | None:
        scale, options = self.context.recipe.scale, self.context.options
        if not options.on_ray:
            return None
        decoding = TaskPool(options.tasks * scale.max_workers, options.task_cpus)
        return ActorPool(scale.max_workers, scale.cpus_per_worker, scale.worker_gpus, decoding)

    def _write_file(self, file: EmbeddingFile, embeddings: np.ndarray) -> None:
        # An overflow is reported below, with the image.
        with np.errstate(over="ignore"):
            embeddings = embeddings.astype(self.stage.dtype)
        wrong = np.flatnonzero(~np.isfinite(embeddings).all(1))
        if len(wrong):
            raise StageFailed(f"the embedding of image {file.ids[wrong[0]]} is not finite in {self.stage.dtype}")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
        columns = [
            pa.array(file.ids),
            pa.array(self.context.store.read_paths(file.ids), pa.string()),
            pa.array(self.context.splits.labels[file.ids]),
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
            raise StageFailed(f"{self.folder / file.name}: cannot be written: {describe_os_error(error)}") from None


def _build_manifest(
    context: StageContext, stage: Embed, instance: StageInstance, files: list[EmbeddingFile]
) -> dict[str, Any]:
    assert instance.encoder is not None
    folder, (encoder, _) = instance.folder / EMBEDDINGS_FOLDER, read_verified(instance.encoder)
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
        "store": context.store.hash,
        "encoder": {name: entry["sha256"] for name, entry in encoder["files"].items()},
        "size": vector.list_size if vector else 0,
        "dtype": stage.dtype,
        "precision": stage.precision,
        "counts": {split: len(getattr(context.splits, split)) for split in stage.splits},
        "files": rows,
    }


class _FileShape(RecordShape):
    """The entry of a file in a manifest of embeddings."""

    file: str
    split: str
    count: Count
    bytes: Count
    sha256: HexDigest


class _EmbeddingsShape(RecordShape):
    """A manifest of embeddings."""

    format: Literal[1]
    dtype: Literal["float32", "float16"]
    # The number format that the encoder computed in.
    precision: str = "fp32"
    size: Count
    counts: dict[str, Count]
    files: list[_FileShape]


EMBEDDINGS_SHAPE = TypeAdapter(_EmbeddingsShape)


@dataclass(frozen=True)
class _ManifestEntry:
    """The entry of one file in the manifest."""

    file: str
    split: str
    count: int
    bytes: int
    sha256: str


def open_embeddings(folder: Path, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (n,) int64 ids and (n, C) embeddings of a split, or of all splits in the order of the manifest. Every
    file is checked.

    Raises:
        UserError: a file is missing, damaged or not what the manifest says, or there is no such split; the message
            names it.
    """
    manifest, entries = read_embeddings_manifest(folder)
    if split is not None and split not in manifest["counts"]:
        raise UserError(f"{folder}: has no split {split!r}; valid: {', '.join(manifest['counts'])}")
    tables = [_read_checked(folder, entry) for entry in entries if split in (None, entry.split)]
    ids = [table.column("id").to_numpy() for table in tables]
    vectors = [_to_matrix(table, manifest["size"]) for table in tables]
    empty = np.empty((0, manifest["size"]), manifest["dtype"])
    return np.concatenate([np.empty(0, np.int64), *ids]), np.concatenate([empty, *vectors])


def read_embeddings_manifest(folder: Path) -> tuple[dict[str, Any], list[_ManifestEntry]]:
    file = folder / MANIFEST_FILE
    try:
        manifest = parse_record(file.read_bytes(), EMBEDDINGS_SHAPE, "manifest")
        entries = [_ManifestEntry(**entry) for entry in manifest["files"]]
        if any(Path(entry.file).name != entry.file for entry in entries):
            raise ValueError("a file outside of its folder")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: is not a whole manifest of embeddings ({one_line(error)})") from None
    return manifest, entries


def _read_checked(folder: Path, entry: _ManifestEntry) -> pa.Table:
    path = folder / entry.file
    try:
        if file_sha256(path) != entry.sha256:
            raise ValueError("its sha256 is not the one in its manifest")
        table = read_parquet_table(path, ["id", "embedding"])
        if len(table) != entry.count:
            raise ValueError(f"it has {len(table)} rows, its manifest says {entry.count}")
    except DAMAGE_ERRORS as error:
        reason = describe_os_error(error, limit=None)
        raise UserError(f"{path}: is missing or damaged: {reason}; delete {folder.parent} and run again") from None
    return table


def _to_matrix(table: pa.Table, size: int) -> np.ndarray:
    values: np.ndarray = table.column("embedding").combine_chunks().flatten().to_numpy()
    return values.reshape(-1, size)


def _unwrap_ray_error(error: BaseException, instance: StageInstance) -> Exception:
    """Unwraps Ray's exception to its root cause, and keeps the last line of its message without the paragraph of advice
    that Ray adds.
    """
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    text = str(cause).strip().partition("\n\n")[0].splitlines()
    if isinstance(cause, UserError):
        return UserError(" ".join(text))
    return StageFailed(f"{instance.label}: {type(cause).__name__}: {text[-1] if text else 'died'}")


class EmbedStage(StageKind[Embed]):
    """Embeddings of the images of a store, as Parquet."""

    section = Embed
    runs_on = "driver+ray"

    def outputs(self, stage: Embed, instance: StageInstance) -> list[StageOutput]:
        folder = instance.folder / EMBEDDINGS_FOLDER
        return [StageOutput("embeddings", folder, f'fl.open_embeddings("{folder}")')]

    def run(self, context: StageContext, stage: Embed, instance: StageInstance) -> None:
        """Writes `embeddings/` and `result.json` into the instance's folder.

        Raises:
            UserError: the store is damaged.
            StageFailed: a task or an actor failed more often than `scale.max_failures` allows.
        """
        folder = instance.folder / EMBEDDINGS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / MANIFEST_FILE, *folder.glob(".*.tmp")):  # of a stage that was killed
            stale.unlink(missing_ok=True)
        writer, wanted = _EmbeddingWriter(context, stage, instance), list(_plan_files(context, stage))
        failures = context.recipe.scale.max_failures if context.options.on_ray else 0
        while not _attempt_files(writer, wanted, instance, last=failures == 0):
            failures -= 1
        result = _build_manifest(context, stage, instance, wanted)
        write_sealed_json(folder / MANIFEST_FILE, result)
        instance.write_result(result)

    def result_shape(self, stage: Embed) -> TypeAdapter[Any]:
        return EMBEDDINGS_SHAPE

    def check_source(self, name: str, stage: Embed, context: RecipeContext) -> None:
        check_class_names(f"stages.{name}.map_classes", stage.map_classes, context.source.classes)

    def streamed_batches(self, stage: Embed, dataset: DatasetOptions, workers: int) -> list[StreamedBatch]:
        return [(stage.batch_size, [dataset.image_size])]
