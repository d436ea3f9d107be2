"""Frozen features that a later stage of the same run takes, instead of a pass over the same images.

    .features/<hash>.safetensors    (n, d) features of some images, with a sum, in the folder of the recipe's run

They are to the last bit those that a stage would compute itself: the hash is of all that decides a bit of them
(`hash_features`). A file is kept as long as a later stage or seed may take it, and all are removed when a run ends.
Features that are missing, damaged, or more than MAX_KEPT_BYTES altogether are computed again.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from firstlight.pipeline.config.load import hash_json
from firstlight.pipeline.data.mirror.places import find_mirror
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.files import atomic_path
from firstlight.pipeline.stages.features.feature_uses import list_feature_uses, list_later_uses
from firstlight.pipeline.stages.shared_work import hash_weights
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.attempts import describe_machine
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.collective import broadcast_object, broadcast_tensor, rank, world_size
from firstlight.tasks.nn.feature_extractor import FeatureExtractor

# Hidden, so that it is not uploaded where the storage is a bucket.
KEPT_FOLDER = ".features"
# The largest number of bytes of all kept features of a run.
MAX_KEPT_BYTES = 1_000_000_000


def group_places(splits: Splits, ids: np.ndarray, fewest: int = 1) -> list[np.ndarray]:
    """Returns the positions in (n,) `ids` of the images of each split with a label and without, in the order of ids.

    A batch is of one group, so that an image is in the same batch whichever stage asks for it. Groups of less than
    `fewest` images are joined with the one before.
    """
    groups = (splits.labels[ids] < 0).astype(np.int64)
    for number, split in enumerate((splits.train, splits.val, splits.test)):
        groups += 2 * (number + 1) * np.isin(ids, split)
    found: list[np.ndarray] = []
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        if found and min(len(places), len(found[-1])) < fewest:
            places = np.concatenate((found.pop(), places))
        found.append(places[np.argsort(ids[places], kind="stable")])
    return found


def hash_features(
    context: StageContext,
    network: FeatureExtractor,
    weights: str,
    ids: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> list[str]:
    """Returns, for each output of a network, a hash of all that decides the bits of the features of `ids`.

    Args:
        weights: `hash_weights` of the network.
        ids: one group of images (`group_places`).
    """
    loader = context.build_loader([context.recipe.dataset.eval_augment], 0)
    facts = {
        "weights": weights,
        "encoder": network.encoder.spec,
        "images": [loader.store.hash, loader.ops, loader.size, loader.max_pixels],
        "ids": hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest(),
        "batches": [batch_size, world_size()],
        "autocast": str(network.autocast),
        "machine": [describe_machine(device), torch.get_num_threads(), torch.get_float32_matmul_precision()],
    }
    layers = [[layer, network.pool] for layer in network.layers]
    outputs: list[Any] = layers if network.head is None else [network.head.spec]
    return [hash_json({**facts, "output": output}) for output in outputs]


def has_kept(run: Path) -> bool:
    """Returns True if anything may be kept, so that it is worth while to hash weights."""
    return (run / KEPT_FOLDER).is_dir()


def read_kept(run: Path, key: str) -> Tensor | None:
    """Returns the features that are kept under a hash; None if there are none or they are damaged."""
    try:
        with safe_open(str(run / KEPT_FOLDER / f"{key}.safetensors"), "pt") as opened:  # type: ignore[no-untyped-call]
            rows = opened.get_tensor("features").clone()
            stated = (opened.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return rows if stated == _sum_features(key, rows) else None


def write_kept(run: Path, key: str, rows: Tensor) -> None:
    """Keeps (n, d) features under a hash, unless the disk refuses them or all would take more than MAX_KEPT_BYTES."""
    folder, rows = run / KEPT_FOLDER, rows.detach().cpu().contiguous()
    with contextlib.suppress(OSError, SafetensorError):
        folder.mkdir(exist_ok=True)
        taken = sum(file.stat().st_size for file in folder.iterdir())
        if taken + rows.nbytes <= MAX_KEPT_BYTES:
            with atomic_path(folder / f"{key}.safetensors") as temporary:
                save_file({"features": rows}, temporary, {"sha256": _sum_features(key, rows)})


def remove_kept(run: Path, key: str) -> None:
    """Removes the features that are kept under a hash, if there are any."""
    with contextlib.suppress(OSError):
        (run / KEPT_FOLDER / f"{key}.safetensors").unlink()


def _sum_features(key: str, rows: Tensor) -> str:
    found = hashlib.sha256(f"{key} {tuple(rows.shape)} {rows.dtype}".encode())
    found.update(rows.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def keep_features_for(run: Path) -> Iterator[None]:
    """Removes the kept features of a run's folder before and after the block: those of a killed run are not taken."""
    shutil.rmtree(run / KEPT_FOLDER, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(run / KEPT_FOLDER, ignore_errors=True)


class KeptFeatures:
    """The features of a stage's networks, as far as earlier stages of the run have kept them and later ones take them.

    Its methods are collective. Rank 0 reads and writes, on whichever machine it is.
    """

    def __init__(
        self, context: StageContext, instance: StageInstance, networks: Mapping[str, FeatureExtractor], batch_size: int
    ) -> None:
        self.context, self.batch_size, self.run = context, batch_size, instance.folder.parent
        recipe = context.recipe
        # Machines have folders of their own for a bucket, which nobody would empty.
        is_seen = find_mirror(self.run) is None or recipe.scale.address == "local"
        is_active = bool(instance.facts) and is_seen
        self.uses = list_feature_uses(recipe, instance.stage) if is_active else {}
        self.later = list_later_uses(recipe, instance.stage, instance.seed) if is_active else frozenset()
        self.networks = {arm: network for arm, network in networks.items() if arm in self.uses}
        self._weights: dict[str, str] = {}

    def load(self, ids: np.ndarray) -> dict[str, list[Tensor]]:
        """Returns the features of `ids`, one group, by network: of each output, where all of them are kept.

        Files that no later stage takes are removed.
        """
        found = self._read_and_remove(ids) if rank() == 0 and not self._is_idle() else {}
        counts = broadcast_object({arm: len(layers) for arm, layers in found.items()})
        device = self.context.device
        return {
            arm: [broadcast_tensor(found[arm][k] if rank() == 0 else None, device) for k in range(count)]
            for arm, count in counts.items()
        }

    def save(self, arm: str, ids: np.ndarray, layers: Sequence[Tensor]) -> None:
        """Keeps what later stages take of the features that a network gives of `ids`, one group."""
        if rank() == 0 and arm in self.networks and not self._is_idle():
            for (key, is_wanted), rows in zip(self._list_files(arm, ids), layers, strict=True):
                if is_wanted:
                    write_kept(self.run, key, rows)

    def _is_idle(self) -> bool:
        """Returns True if nothing is kept and nothing is to be, so that no weights need to be hashed."""
        return not self.networks or not (self.later or has_kept(self.run))

    def _read_and_remove(self, ids: np.ndarray) -> dict[str, list[Tensor]]:
        found = {}
        for arm in self.networks:
            files = self._list_files(arm, ids)
            layers = [read_kept(self.run, key) for key, _ in files]
            if not any(layer is None for layer in layers):
                found[arm] = [layer for layer in layers if layer is not None]
            for key, is_wanted in files:
                if not is_wanted:
                    remove_kept(self.run, key)
        return found

    def _list_files(self, arm: str, ids: np.ndarray) -> list[tuple[str, bool]]:
        """Returns the hash of each output of a network, and whether a later stage takes it."""
        network = self.networks[arm]
        if arm not in self._weights:
            self._weights[arm] = hash_weights(network)
        keys = hash_features(self.context, network, self._weights[arm], ids, self.batch_size, self.context.device)
        return [(key, use in self.later) for key, use in zip(keys, self.uses[arm], strict=True)]
