"""Spatial Contrasting (Hoffer, Hubara and Ailon 2016, arXiv 1610.00243).

The features of two patches of an image should be closer to each other than to those of patches of other images. With
f_i^(1) and f_i^(2) the features of two patches of image i, over a batch of N images:

    L = -1/N sum_i log  exp(-|| f_i^(1) - f_i^(2) ||)  /  sum_j exp(-|| f_i^(1) - f_j^(2) ||)          (eq. 2)

This is a softmax over l2 distances, without temperature. The batch is that of all workers. Patches are cut out of
feature maps (the long version's algorithm 1) or out of the image (section 4.1). The paper does not give the layer, the
size of a patch, and whether two patches of an image may overlap (here they may: each is drawn uniformly over all
positions).
"""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from firstlight.tasks.collective import gather_over_workers, rank
from firstlight.tasks.counter_rng import derive_keys, draw_uniform
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pool_maps, pooled_size
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo
from firstlight.tasks.supervised_loss import labelled_cross_entropy

# The stream of the positions of patches in the image; PATCH_STREAM + 1 + k is that of patches in map k.
PATCH_STREAM = 0x5C00


def patch_distances(anchors: Tensor, positives: Tensor, others: Tensor) -> Tensor:
    """Returns the (B, G) l2 distances of this worker's anchors to the contrasting patches of all workers.

    An anchor's own column holds its distance to its positive. Only that pair is near, so it is computed exactly. The
    squares of the other distances are expanded to a matrix product around a centre, which does not change them but
    keeps their digits. The gradient at distance 0 is 0.

    Args:
        anchors: (B, d) features of this worker.
        positives: (B, d) features of this worker.
        others: (G, d) features of all workers' contrasting patches.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        centre = others.mean(0).detach()
        a, o = anchors - centre, others - centre
        squares = a.square().sum(1)[:, None] + o.square().sum(1) - 2.0 * (a @ o.T)
        near = (anchors - positives).square().sum(1)
        squares = torch.diagonal_scatter(squares, near, offset=rank() * len(anchors))
        apart = squares > 0
        return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


def contrast_loss(anchors: Tensor, positives: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of eq. 2's terms, and the share of anchors that are nearest to their positive.

    Both are over this worker's anchors. The arguments are those of `patch_distances`.
    """
    apart = patch_distances(anchors, positives, others)
    own = torch.arange(len(anchors), device=anchors.device) + rank() * len(anchors)
    return F.cross_entropy(-apart, own), (apart.argmin(1) == own).float().mean()


def draw_corners(key: Tensor, count: int, rows: int, columns: int) -> Tensor:
    """Draws (B, count, 2) int64 upper left corners for (B,) keys, uniformly over rows x columns positions."""
    u = draw_uniform(key, 2 * count)
    return torch.stack((u[:, :count] * rows, u[:, count:] * columns), dim=2).long()


def cut_patches(maps: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cuts (B, P, C, side, side) patches out of (B, C, h, w) maps at (B, P, 2) corners."""
    within = torch.arange(side, device=maps.device)
    rows = corners[:, :, 0, None, None] + within[:, None]
    columns = corners[:, :, 1, None, None] + within
    image = torch.arange(len(maps), device=maps.device)[:, None, None, None]
    return maps[image, :, rows, columns].movedim(4, 2)


class SpatialContrasting(Method):
    """The method on feature maps of the encoder, or on patches of the image.

    Parameters of the encoder that the chosen maps do not depend on are not trained.

    `level`: `feature` cuts patches out of the encoder's maps (long version, arXiv 1610.00243, algorithm 1);
    with `pixel` they are cut out of the image, and the maps that the encoder gives for them are compared (section 4.1).
    `layers`: the encoder's maps that are compared; 0 is the first, -1 the last (the paper does not say which). The
    losses of several maps are added (section 4.2).
    `patch_size`: the side of a patch, in positions of the map or in pixels of the image (the paper does not say; 4
    positions in a third party's port to Keras, dlacombejr/SpatialContrastingNetwork).
    `patches`: the number of patches of an image (2 in section 4.2). For more than 2 the loss is the mean over the pairs
    of an image.
    `symmetric`: true makes either patch of a pair the anchor, and takes the mean of both, as the port does. (The long
    version's 1/2 [L(x1, x2) + L(x2, x1)] exchanges images, which eq. 2 contains already; eq. 2 itself and algorithm 1
    are not symmetric in patches.)
    `contrast`: the patches that an anchor f_i^(1) is contrasted with: `eq2` (eq. 2 and algorithm 1) are the f_j^(2) of
    all images, with i itself (the positive) among them; `eq1` are the f_j^(1) of the other images, and the positive.
    `patch_features`: the features of a patch: its map, flattened (the port) or averaged (the paper does not say).
    `supervised_weight`: the weight of the cross-entropy of a linear classifier on labelled images in parallel. The
    paper pretrains without labels; this is its future work (section 6).
    """

    title: ClassVar[str] = "Spatial Contrasting"
    paper: ClassVar[str] = (
        "Hoffer, Hubara and Ailon 2016, Deep unsupervised learning through spatial contrasting, "
        "https://arxiv.org/abs/1610.00243"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "Layer, size and number of the patches, and whether two of an image may overlap, are not given by the paper; "
        "here they may overlap.",
        "Whether a patch's map is flattened or averaged is not given by the paper; it is a setting.",
        "The paper's eqs. 1 and 2 differ in what an anchor is contrasted with; the setting `contrast` says which one "
        "was used.",
        "The paper does not describe its networks in full: the encoder is another, or that of a third party's port. "
        "The classes come from a linear layer on the averaged last map; in the port from a 1x1 convolution with "
        "normalisation and leaky ReLU, whose maps are averaged.",
        "The loss contrasts with the images of all workers.",
        "The recipes have the rates of the long version, which names neither batch size, length nor the size of the "
        "translations; the momentum and the decay are those of other code of its authors.",
        "In the recipes, 2 % of the training images are held out to choose settings on; the paper trains on all.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        level: Literal["feature", "pixel"] = "feature",
        layers: tuple[int, ...] = (-1,),
        patch_size: Annotated[int, Ge(1)] = 4,
        patches: Annotated[int, Ge(2)] = 2,
        symmetric: bool = False,
        contrast: Literal["eq2", "eq1"] = "eq2",
        patch_features: Literal["flatten", "avg"] = "flatten",
        supervised_weight: Annotated[float, Ge(0.0)] = 0.0,
    ) -> None:
        super().__init__(encoder, info)
        self.level, self.patch_size, self.patches = level, patch_size, patches
        self.contrast, self.patch_features, self.supervised_weight = contrast, patch_features, supervised_weight
        self.layers = _nonnegative_layers(layers, len(encoder.shapes))
        self.pairs = list(itertools.combinations(range(patches), 2))
        self.pairs += [(b, a) for a, b in self.pairs] if symmetric else []
        self.depth = max(self.layers) + 1
        compared = self._compute_compared_maps()
        if supervised_weight > 0:
            if not info.classes:
                raise ValueError(
                    f"supervised_weight: {supervised_weight:g} needs labels, and the data set has no classes"
                )
            self.classifier = nn.Linear(pooled_size(encoder, "avg"), info.classes)
        else:
            encoder.freeze_unused(compared)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(labels=parameters["supervised_weight"] > 0)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the (B, P, d) features of patches for each layer, then (B, classes) logits if labels are used."""
        images, supervised = batch.views[0], self.supervised_weight > 0
        maps = (
            self.encoder(images, depth=None if supervised else self.depth)
            if supervised or self.level == "feature"
            else []
        )
        patches = self._patches_of_maps(maps, batch) if self.level == "feature" else self._maps_of_patches(batch)
        features = [p.mean((3, 4)) if self.patch_features == "avg" else p.flatten(2) for p in patches]
        logits = [self.classifier(pool_maps(maps, "avg"))] if supervised else []
        return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (*features, *logits))

    def predict(self, images: Tensor) -> Tensor | None:
        if not self.supervised_weight:
            return None
        return self.classifier(pool_maps(self.encoder(images), "avg")).argmax(1)  # type: ignore[no-any-return]

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the contrast loss, summed over layers, plus the weighted supervised loss, and their accuracies."""
        layers = [self._contrast_patches(features) for features in outputs[: len(self.layers)]]
        contrast = torch.stack([loss for loss, _ in layers]).sum()
        accuracy = torch.stack([hits for _, hits in layers]).mean()
        if not self.supervised_weight:
            return {"loss": contrast, "accuracy": accuracy}
        supervised, hits = labelled_cross_entropy(outputs[-1], batch.labels)
        whole = contrast + self.supervised_weight * supervised
        return {
            "loss": whole,
            "contrast_loss": contrast,
            "supervised_loss": supervised,
            "accuracy": accuracy,
            "supervised_accuracy": hits,
        }

    def _contrast_patches(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loss and accuracy of (B, P, d) features of one layer, as means over pairs of patches."""
        everyone = gather_over_workers(features)
        terms = [
            contrast_loss(features[:, a], features[:, b], everyone[:, b if self.contrast == "eq2" else a])
            for a, b in self.pairs
        ]
        return torch.stack([loss for loss, _ in terms]).mean(), torch.stack([hits for _, hits in terms]).mean()

    def _patches_of_maps(self, maps: list[Tensor], batch: Batch) -> list[Tensor]:
        """Cuts the (B, P, C, s, s) patches of each layer out of the (B, C, h, w) maps of whole images."""
        return [self._cut_patches(maps[k], batch, PATCH_STREAM + 1 + k) for k in self.layers]

    def _maps_of_patches(self, batch: Batch) -> list[Tensor]:
        """Computes the (B, P, C, h, w) maps of each layer for patches of the images."""
        crops = self._cut_patches(batch.views[0], batch, PATCH_STREAM).flatten(0, 1)
        maps = self.encoder(crops, depth=self.depth)
        return [maps[k].unflatten(0, (len(batch.ids), self.patches)) for k in self.layers]

    def _cut_patches(self, maps: Tensor, batch: Batch, stream: int) -> Tensor:
        """Cuts the (B, P, C, s, s) patches that (seed, pass, id) have at this stream."""
        rows, columns = (side - self.patch_size + 1 for side in maps.shape[2:])
        key = derive_keys(self.info.seed, batch.passes, batch.ids, stream)
        return cut_patches(maps, draw_corners(key, self.patches, rows, columns), self.patch_size)

    def _compute_compared_maps(self) -> list[Tensor]:
        """Computes the maps whose features are compared, for one black image or a patch of it.

        Raises:
            ValueError: a patch is larger than the map or image that it is cut out of, or the encoder has no map for it.
        """
        encoder, side = self.encoder, self.patch_size
        for k in self.layers if self.level == "feature" else ():
            if side > min(encoder.shapes[k][1:]):
                raise ValueError(
                    f"patch_size: {side} is larger than map {k} of the encoder, which has "
                    f"{'x'.join(map(str, encoder.shapes[k][1:]))} positions"
                )
        if self.level == "pixel" and side > encoder.image_size:
            raise ValueError(f"patch_size: {side} pixels are more than the images' {encoder.image_size}")
        size = side if self.level == "pixel" else encoder.image_size
        image = next(encoder.parameters()).new_zeros(1, 3, size, size)
        mode = encoder.training
        try:
            maps = encoder.eval()(image, depth=self.depth)
        # No position is left after pooling, there is a single value to normalise, or a ViT cannot divide the image.
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = f": {error}" if "divisible" in str(error) else ""
            problem = f"cannot be taken by the encoder{reason}" if reason else "are too small for the encoder"
            raise ValueError(f"patch_size: {side} pixels {problem}") from None
        finally:
            encoder.train(mode)
        return [maps[k] for k in self.layers]


def _nonnegative_layers(layers: tuple[int, ...], count: int) -> list[int]:
    """Returns the indices of `count` maps, with negative ones turned into 0..count-1.

    Raises:
        ValueError: there is no index, one out of range, or one map twice.
    """
    outside = [k for k in layers if not -count <= k < count]
    found = [k % count for k in layers]
    if outside or not layers:
        raise ValueError(
            f"layers: {list(layers)} must be among the encoder's {count} maps, 0..{count - 1} or -{count}..-1"
        )
    if len(set(found)) < len(found):
        raise ValueError(f"layers: {list(layers)} names a map twice (the encoder has {count})")
    return found
