import pytest
import torch

from firstlight.tasks.nn.weights.key_matching import (
    convert_transformers,
    drop_compiler_names,
    find_prefix,
    strip_prefix,
)

WANTED = ("conv1.weight", "layer1.0.weight", "norm.weight")


def behind(*prefixes: str) -> list[str]:
    return [prefix + name for prefix in prefixes for name in WANTED] + ["fc.weight", "queue", "block.norm.weight"]


@pytest.mark.parametrize(
    ("prefixes", "chosen", "others"),
    [
        (("",), "", ()),
        (("module.",), "module.", ()),
        (("model.backbone.",), "model.backbone.", ()),
        (("module.encoder_k.", "module.encoder_q."), "module.encoder_q.", ("module.encoder_k.",)),
        (("student.backbone.", "teacher.backbone."), "teacher.backbone.", ("student.backbone.",)),
        (("backbone_momentum.", "backbone."), "backbone.", ("backbone_momentum.",)),
        (("target_net.", "online_net."), "online_net.", ("target_net.",)),
        (("net_b.", "net_a."), "net_a.", ("net_b.",)),
        (("encoder_momentum.", "net."), "net.", ("encoder_momentum.",)),
    ],
)
def test_prefix_of_the_network_is_found(prefixes: tuple[str, ...], chosen: str, others: tuple[str, ...]) -> None:
    found = find_prefix(behind(*prefixes), WANTED)
    assert (found.text, found.count, found.others) == (chosen, 3, others)


def test_prefix_with_more_names_wins_over_a_preferred_one() -> None:
    names = [*behind("plain."), "teacher.conv1.weight"]
    assert find_prefix(names, WANTED).text == "plain."
    assert find_prefix(["other"], WANTED).count == 0


def test_names_of_the_compiler_are_removed_wherever_they_stand() -> None:
    names = {"_orig_mod.a.weight": torch.ones(1), "module._orig_mod.b": torch.ones(1), "c._orig_mod.d": torch.ones(1)}
    assert list(drop_compiler_names(names)) == ["a.weight", "module.b", "c.d"]


def test_prefix_is_stripped_from_the_names_that_have_it() -> None:
    assert list(strip_prefix({"m.a": torch.ones(1), "b": torch.ones(1), "m.m.c": torch.ones(1)}, "m.")) == ["a", "m.c"]


def test_names_of_transformers_become_those_of_timm() -> None:
    root = "vit."
    names = {
        f"{root}embeddings.cls_token": (1, 1, 4),
        f"{root}embeddings.position_embeddings": (1, 5, 4),
        f"{root}embeddings.patch_embeddings.projection.weight": (4, 3, 2, 2),
        f"{root}encoder.layer.0.attention.output.dense.bias": (4,),
        f"{root}encoder.layer.0.intermediate.dense.weight": (16, 4),
        f"{root}encoder.layer.0.output.dense.weight": (4, 16),
        f"{root}encoder.layer.0.layernorm_before.weight": (4,),
        f"{root}layernorm.weight": (4,),
        "classifier.weight": (9, 4),
    }
    tensors = {name: torch.rand(shape) for name, shape in names.items()}
    parts = {
        f"{root}encoder.layer.0.attention.attention.{part}.weight": torch.rand(4, 4)
        for part in ("query", "key", "value")
    }
    found = convert_transformers(tensors | parts)
    assert found.keys() == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"),
        *("blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "blocks.0.norm1.weight"),
        "blocks.0.attn.qkv.weight",
    }
    assert torch.equal(found["blocks.0.attn.qkv.weight"], torch.cat(list(parts.values())))
    plain = {"conv1.weight": torch.ones(1)}
    assert convert_transformers(plain) == plain
