"""Pretraining methods by name, one page each."""

from tasks.pretrain.method import Method
from tasks.pretrain.nat import NoiseAsTargets

METHODS: dict[str, type[Method]] = {"nat": NoiseAsTargets}
