"""Names of tensors in foreign state dicts -> the names of a network: prefixes of wrappers, and layouts of others."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Parts of a prefix that say which of several networks it is, by preference, and those of copies that follow another.
PREFERRED_WORDS = ("ema", "teacher", "encoder_q", "online", "query", "backbone", "encoder", "model", "student")
FOLLOWING_WORDS = ("momentum", "encoder_k", "target", "key")
# Blocks of transformers' ViT, DeiT, DINOv2 and MAE -> timm's.
TRANSFORMERS_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)


@dataclass(frozen=True)
class KeyPrefix:
    """The prefix that the names of a network have in a state dict."""

    text: str
    # The number of the network's names that were found behind it.
    count: int
    # Other prefixes with as many names: other networks in the same file.
    others: tuple[str, ...]


def drop_compiler_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes `_orig_mod.`, which torch.compile adds, wherever it stands."""
    return {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): tensor for name, tensor in tensors.items()}


def find_prefix(names: Collection[str], wanted: Collection[str]) -> KeyPrefix:
    """Finds the prefix behind which most of the names `wanted` stand among `names`.

    If several prefixes have equally many, one with the first of `PREFERRED_WORDS` is taken, one with a word of
    `FOLLOWING_WORDS` last, and a shorter one before a longer one.
    """
    own, counts = set(wanted), Counter[str]()
    for name in names:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        counts.update(name[:start] for start in starts if name[start:] in own)
    if not counts:
        return KeyPrefix("", 0, ())
    most = max(counts.values())
    best, *others = sorted((prefix for prefix, count in counts.items() if count == most), key=_rank_prefix)
    return KeyPrefix(best, most, tuple(others))


def _rank_prefix(prefix: str) -> tuple[bool, int, int, str]:
    ranks = [rank for rank, word in enumerate(PREFERRED_WORDS) if word in prefix]
    follows = any(word in prefix for word in FOLLOWING_WORDS)
    return follows, min(ranks, default=len(PREFERRED_WORDS)), len(prefix), prefix


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def convert_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a ViT of the library transformers as timm's; others are returned as they are.

    Query, key and value become one matrix.
    """
    root = next((name for name in tensors if name.endswith("embeddings.patch_embeddings.projection.weight")), None)
    if root is None:
        return dict(tensors)
    inner = strip_prefix(tensors, root.removesuffix("embeddings.patch_embeddings.projection.weight"))
    renamed: dict[str, Tensor] = {}
    for name, tensor in inner.items():
        match = re.fullmatch(r"(encoder\.layer\.\d+)\.attention\.attention\.query\.(weight|bias)", name)
        if match:
            kinds = [f"{match[1]}.attention.attention.{part}.{match[2]}" for part in ("query", "key", "value")]
            if all(kind in inner for kind in kinds):
                target = f"{match[1].replace('encoder.layer', 'blocks')}.attn.qkv.{match[2]}"
                renamed[target] = torch.cat([inner[kind] for kind in kinds])
        elif not re.search(r"\.attention\.attention\.(key|value)\.", name):
            renamed[_rename_transformers(name)] = tensor
    return renamed


def _rename_transformers(name: str) -> str:
    for old, new in TRANSFORMERS_NAMES:
        name = name.replace(old, new)
    return re.sub(r"^layernorm\.", "norm.", name)
