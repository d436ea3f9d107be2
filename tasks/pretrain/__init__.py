"""Pretraining methods by name, one page each."""

from firstlight.tasks.pretrain.clustering_locality import ClusteringLocality
from firstlight.tasks.pretrain.dae import DenoisingAutoEncoder
from firstlight.tasks.pretrain.method import Method
from firstlight.tasks.pretrain.nat import NoiseAsTargets
from firstlight.tasks.pretrain.spatial_contrasting import SpatialContrasting
from firstlight.tasks.pretrain.super_and import SuperAnd

METHODS: dict[str, type[Method]] = {
    "nat": NoiseAsTargets,
    "spatial_contrasting": SpatialContrasting,
    "clustering_locality": ClusteringLocality,
    "dae": DenoisingAutoEncoder,
    "super_and": SuperAnd,
}
