"""Pretraining methods by name, one page each."""

from tasks.pretrain.clustering_locality import ClusteringLocality
from tasks.pretrain.dae import DenoisingAutoEncoder
from tasks.pretrain.method import Method
from tasks.pretrain.nat import NoiseAsTargets
from tasks.pretrain.spatial_contrasting import SpatialContrasting
from tasks.pretrain.super_and import SuperAnd

METHODS: dict[str, type[Method]] = {
    "nat": NoiseAsTargets,
    "spatial_contrasting": SpatialContrasting,
    "clustering_locality": ClusteringLocality,
    "dae": DenoisingAutoEncoder,
    "super_and": SuperAnd,
}
