"""`python -m bench.scaling --images 1e9 --workers 512`: the tables of docs/scaling.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.scaling import memory, orders
from bench.scaling.cost import COST, NETWORKS, Machine, Network, assignment, discovery, pass_over_bank
from bench.scaling.traffic import Message, of_discovery, of_gradients, of_step
from firstlight.pipeline import ROOT
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.data.store import CACHE_BYTES, ROW_GROUP
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import Method, Setting

CONF = ROOT / "conf" / "method"
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a file of conf/method, and what is changed in it
    "nat": ("nat", {"pool": "avg"}),
    "nat, assign: local": ("nat", {"pool": "avg", "assign": "local"}),
    "spatial_contrasting": ("spatial_contrasting", {}),
    "spatial_contrasting, patch_features: avg": ("spatial_contrasting", {"patch_features": "avg"}),
    "clustering_locality": ("clustering_locality", {}),
    "dae": ("dae", {}),
    "super_and": ("super_and", {}),
    "super_and, variant: reference": ("super_and", {"variant": "reference"}),
}
CLASSES, EPOCHS = 1000, 200


@dataclass(frozen=True)
class Scale:
    """`rows`: images of a worker in a step."""

    images: int
    workers: int
    rows: int

    @property
    def batch(self) -> int:
        return self.workers * self.rows

    @property
    def steps(self) -> int:
        return self.images // self.batch

    @property
    def shard(self) -> int:
        """Rows of a table on the fullest worker."""
        return -(-self.images // self.workers)


def builder(case: str, encoder: Encoder) -> Callable[[int], Method]:
    """A method of so many images, around one network that all share."""
    name, changes = CASES[case]
    raw = {**dict(yaml_reader.read(CONF / f"{name}.yaml")), **changes}
    parameters: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in raw.items() if key != "name"
    }
    return lambda size: METHODS[name](
        encoder, Setting(size, EPOCHS * parameters.get("rounds", 1), 0, CLASSES), **parameters
    )


@dataclass(frozen=True)
class Told:
    """What there is to tell of a method."""

    case: str
    method: Method
    exchanges: list[Message]  # of its loss
    gradients: list[Message]

    @property
    def bank(self) -> int | None:
        """The dimension of its memory bank."""
        found = [table.rows.shape[1] for table in self.method.tables.values() if isinstance(table, MemoryBank)]
        return found[0] if found else None

    def solved(self, scale: Scale) -> int:
        """Images whose targets are exchanged by one worker in a step; 0: none."""
        assign = getattr(self.method, "assign", None)
        return {"global": scale.batch, "local": scale.rows}.get(str(assign), 0)

    def parts(self, scale: Scale, machine: Machine, network: Network) -> dict[str, float]:
        """Seconds of a step."""
        bank = pass_over_bank(scale.batch * self._views(), scale.shard, self.bank) / machine.flops if self.bank else 0.0
        return {
            "networks": scale.rows / machine.images,
            "gradients": network.seconds(self.gradients, scale.workers),
            "exchanges": network.seconds(self.exchanges, scale.workers),
            "assignment": assignment(self.solved(scale)),
            "bank": bank,
        }

    def _views(self) -> int:
        """Queries of the bank for each image."""
        return 2 if getattr(self.method, "variant", "") == "reference" else 1


def tell(case: str, encoder: Encoder, scale: Scale) -> Told:
    build = builder(case, encoder)
    encoder.requires_grad_(True)
    exchanges = of_step(build, scale.workers, scale.rows, encoder.image_size) if scale.workers > 1 else []
    encoder.requires_grad_(True)
    method = build(scale.workers)
    return Told(case, method, exchanges, of_gradients(method))


def size(count: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def table(title: str, *headings: str) -> Table:
    out = Table(title=title, title_justify="left")
    for k, heading in enumerate(headings):
        out.add_column(heading, justify="left" if k == 0 else "right")
    return out


def traffic_of(told: list[Told], scale: Scale) -> Table:
    title = f"Bytes that a worker sends in a step of {scale.batch:,} images ({scale.rows} a worker)"
    out = table(title, "method", "gradients", "exchanges of the loss", "collectives", "largest result of one")
    for one in told:
        gradients, exchanges = (
            sum(m.sent(scale.workers) for m in messages) for messages in (one.gradients, one.exchanges)
        )
        largest = max((m.result(scale.workers) for m in one.exchanges), default=0)
        out.add_row(
            one.case, size(gradients), size(exchanges), f"{len(one.exchanges) + len(one.gradients)}", size(largest)
        )
    return out


def memory_of(told: list[Told], scale: Scale) -> Table:
    out = table("Memory of the tables", "method", "table", "a row", "of all", "on a worker")
    for one in told:
        for rows in memory.rows(one.method):
            whole = sum(rows.held(scale.images, rank, scale.workers) for rank in range(scale.workers))
            out.add_row(
                one.case,
                rows.name,
                size(rows.row + rows.id),
                size(whole),
                size(rows.held(scale.images, 0, scale.workers)),
            )
        if solved := one.solved(scale):
            out.add_row(one.case, "costs, in a step", "", "", size(COST * solved**2))
    return out


def plan_of(scale: Scale, windows: tuple[int, ...], image_bytes: float, machine: Machine) -> list[Table]:
    held = memory.of_plan(scale.images)
    out = table("The order of all images, in every process that trains or decodes", *held, "all")
    out.columns[0].justify = "right"
    out.add_row(*(size(count) for count in held.values()), size(sum(held.values())))
    title = f"What a worker reads, from {orders.BATCHES} batches of the same plan (images of {size(image_bytes)})"
    read = table(
        title,
        "stream.window",
        "lanes",
        "images a task",
        "row groups a task",
        "read / used",
        "of all row groups",
        "a step",
        "an order",
    )
    for window in windows:
        used = min(window, int(CACHE_BYTES // image_bytes))  # as `worker.plan` does
        found = orders.reading(scale.batch, used, scale.workers)
        seconds = scale.rows * found.amplification * image_bytes / machine.read
        of_task = (f"{found.used:,.0f}", f"{found.groups:,.0f}", f"{found.amplification:.1f}", f"{found.share:.1%}")
        read.add_row(
            f"{window:,} ({used:,} used)", f"{found.lanes}", *of_task, span(seconds), span(found.seconds * scale.images)
        )
    return [out, read]


def time_of(told: list[Told], scale: Scale, machine: Machine) -> Table:
    out = table(
        "Seconds of a step, one after the other",
        "method",
        "network",
        "networks",
        "gradients",
        "exchanges",
        "assignment",
        "bank",
        "most",
    )
    for one in told:
        for network in NETWORKS:
            parts = one.parts(scale, machine, network)
            most = max(parts, key=lambda name: parts[name])
            out.add_row(one.case, network.name, *(span(seconds) if seconds else "" for seconds in parts.values()), most)
    return out


def rounds_of(told: list[Told], scale: Scale, machine: Machine) -> Table:
    out = table(
        "Neighbours of all images, once a round",
        "method",
        "blocks",
        "a worker sends",
        *(n.name for n in NETWORKS),
        "products",
    )
    for one in told:
        if one.bank and "neighbour" in one.method.tables:
            blocks, each = of_discovery(one.bank, scale.images, scale.workers)
            sent = blocks * sum(m.sent(scale.workers) for m in each)
            waits = [span(blocks * network.seconds(each, scale.workers)) for network in NETWORKS]
            products = discovery(scale.images, scale.shard, one.bank) / machine.flops
            out.add_row(one.case, f"{blocks:,}", size(sent), *waits, span(products))
    return out


@click.command(help=__doc__)
@click.option("--images", type=float, default=1e9, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=512, show_default=True)
@click.option(
    "--rows", type=click.IntRange(min=1), default=256, show_default=True, help="Images of a worker in a step."
)
@click.option("--encoder", default="resnet50", show_default=True, help="As a recipe names it.")
@click.option("--image-size", type=int, default=224, show_default=True)
@click.option("--image-bytes", type=float, default=100e3, show_default=True, help="Of an encoded image.")
@click.option(
    "--speed", type=float, default=2500.0, show_default=True, help="Images a second of a worker's networks alone."
)
@click.option(
    "--flops", type=float, default=30e12, show_default=True, help="Of a worker's matrix products, of float32."
)
@click.option(
    "--read", type=float, default=1e9, show_default=True, help="Bytes a second that a worker gets from storage."
)
@click.option("--window", type=int, multiple=True, default=(2048,), show_default=True)
def main(
    encoder: str,
    image_size: int,
    image_bytes: float,
    speed: float,
    flops: float,
    read: float,
    window: tuple[int, ...],
    **size: float,
) -> None:
    torch.manual_seed(0)
    scale, machine = Scale(int(size["images"]), int(size["workers"]), int(size["rows"])), Machine(speed, flops, read)
    network = Encoder({"name": encoder}, image_size)
    told = [tell(case, network, scale) for case in CASES]
    console, title = (
        Console(width=150),
        f"{scale.images:,} images of {image_size} x {image_size}, {scale.workers} workers, {encoder}",
    )
    console.print(
        f"{title}, batches of {scale.batch:,}: {scale.steps:,} steps an epoch. Row groups of {ROW_GROUP} images."
    )
    console.print(traffic_of(told, scale), memory_of(told, scale), *plan_of(scale, window, image_bytes, machine))
    console.print(time_of(told, scale, machine), rounds_of(told, scale, machine))


if __name__ == "__main__":
    main()
