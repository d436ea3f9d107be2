"""Super-AND (anonymous 2019), with Instance (Wu et al. 2018) and AND (Huang et al. 2019) as configurations of it.

Every image is a class of its own: p_i^j, the softmax over j of m_j.v_i / tau (eq. 1), says how likely the embedding v_i is image j, where the
memory bank M holds the last embeddings of all n images. Three losses are added (eq. 6):

    L_and   tell the image from all others, or, where it is selected, together with its nearest neighbour (eqs. 7-10)
    L_ue    the entropy of p_i without the image itself: nearby images attract each other (eqs. 11 and 12)
    L_aug   two views of an image have like relations r = M v / |M v| to the whole bank, those of other images do not (eqs. 2, 13 and 14)

Training goes in rounds (Algorithm 1). Each begins with the discovery of all images' neighbours in the bank and selects those of the images
whose p_i has the lowest entropy (eq. 9): more of them every round. r is never formed: r_i.r_j = v_i G v_j / (|M v_i| |M v_j|) with the Gram
matrix G = M^T M, which is kept up to date at each step.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from firstlight.tasks.collective import gather, rank
from firstlight.tasks.learner import Batch
from firstlight.tasks.memory_bank import MemoryBank
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.heads import Projection
from firstlight.tasks.pretrain.method import Method, Needs, Setting
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.visuals import Curve

Variant = Literal["paper", "reference"]
REFERENCE_OWN_LOGIT = -10.0  # authors' code: in place of leaving the image out of eq. 11


def neighbourhood_loss(others: Tensor, own: Tensor, near: Tensor, selected: Tensor, variant: Variant) -> Tensor:
    """Eq. 10, its mean. (R,) log sum_j exp(logit_j) over j != i, logits of i and of its neighbour, and whether the neighbour counts.

    paper: a selected image is its neighbour's class, which eq. 7 says is not its own; reference: its own or its neighbour's.
    """
    together = near if variant == "paper" else torch.logaddexp(own, near)
    return (torch.logaddexp(others, own) - torch.where(selected, together, own)).mean()


def relation_cosines(left: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """(a, d) and (b, d) embeddings -> (a, b) cosines of their relations to the bank (eq. 2), by its Gram matrix (d, d)."""

    def length(v: Tensor) -> Tensor:
        return (v @ gram * v).sum(1).clamp_min(1e-30).sqrt()

    return left @ gram @ right.T / (length(left)[:, None] * length(right))


def log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p), finite where p = 1."""
    return torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))


def paper_augmentation_loss(across: Tensor, among: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Eqs. 13 and 14, the mean over this worker's b images: across[i, k] = cos(r^_i, r_k) and among[i, k] = cos(r_i, r_k) over the B images k
    of the global batch, own (b,) the column of image i.
    """
    itself = F.one_hot(own, across.shape[1]).bool()
    found = (across / temperature).log_softmax(1).gather(1, own[:, None])[:, 0]
    mistaken = log_complement((among / temperature).log_softmax(1)).masked_fill(itself, 0.0)
    return -(found + mistaken.sum(1)).mean()


def reference_augmentation_loss(cosines: Tensor, own: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """The authors' code, the mean over this worker's 2b relations x_i of both views: cosines[i, k] = x_i.x_k over all 2B, own and positive (2b,)
    the columns of x_i and of the other view. Z_i leaves out k = i; the second factor is a constant (for the caller to detach).
    """
    itself, other = (F.one_hot(column, cosines.shape[1]).bool() for column in (own, positive))
    log_p = (cosines / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    mistaken = log_complement(log_p.masked_fill(itself, -1.0)).masked_fill(itself | other, 0.0)
    return -(log_p.gather(1, positive[:, None])[:, 0] + mistaken.sum(1)).mean()


class SuperAnd(Method):
    """The paper's text and the authors' code differ; each difference is a parameter, or a case of `variant`:

                            variant: paper                             variant: reference
        L_and, L_ue over    the first view                             both views
        selected image      -log p_i^neighbour (eqs. 7 and 10)         -log(p_i^i + p_i^neighbour)
        own class in L_ue   left out (eq. 11)                          its logit is -10
        L_aug               eqs. 13 and 14: k = i in the sums,         no k = i in the sums; all pairs of both views;
                            views against first views, all r learn     the second factor is a constant

        ue_sign             attract: +H is minimised (section 3.2, and the code)      eq12: -H, as eq. 12 is printed
        initial             random: (r + 1) / rounds of the images are selected in round r = 0, 1 .. (section 3.1), those of the first round
                            by the embeddings of the untrained network (Algorithm 1, line 3; all images but the tail of the first epoch)
                            instance, multiple: r / (rounds - 1), the code's: the first round knows no neighbours;
                            with `instance` it has neither L_ue nor L_aug (table 5)

    The printed losses are sums over the batch; both variants take means, as the code does. The weight of L_ue is `ue_step` times the number
    of whole `ue_period` epochs since the round began. The views pass the network as one batch (code); whether the first is augmented too (code)
    or not (Algorithm 1) is the training's `first_view`. The bank takes the first view's embeddings, m <- norm(momentum m + (1 - momentum) v):
    the code writes both views to one row, and which one stays is chance. Without `aug` batches have one view, and all losses are over it.

    Logged of each round's discovery, where it selects images: `consistency`, the share of the selected whose neighbour is of their class (figure 4),
    and `entropy`, the mean of eq. 9 over all images.

    Instance: `neighbours`, `ue` and `aug` off. AND: `ue` and `aug` off. `chunk`: rows of the bank that are looked at together.
    """

    title: ClassVar[str] = "Super-AND (Instance and AND are configurations of it)"
    paper: ClassVar[str] = (
        "Super-AND: anonymous, 2019, under review at ICLR 2020; Instance: Wu et al. 2018; AND: Huang et al. 2019"
    )
    told: ClassVar[tuple[str, ...]] = ("consistency",)
    deviations: ClassVar[tuple[str, ...]] = (
        "Losses are means over the batch; in the paper they are sums.",
        "The paper's text and its authors' code differ; `variant`, `ue_sign` and `initial` say which was followed.",
        "Instance is learned with the softmax over all images, without noise-contrastive estimation.",
        "The memory bank takes the embeddings of the first view; in the authors' code, which view stays is chance.",
        "The authors report the best epoch on test images; here the last epoch counts, and settings are chosen on held-out images.",
    )

    gram: Tensor
    begun: Tensor
    consistency: Tensor
    entropy: Tensor

    def __init__(
        self,
        encoder: Encoder,
        setting: Setting,
        *,
        dim: Annotated[int, Ge(2)] = 128,
        temperature: Annotated[float, Gt(0.0)] = 0.1,
        aug_temperature: Annotated[float, Gt(0.0)] = 0.1,
        momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.5,
        rounds: Annotated[int, Ge(1)] = 5,
        variant: Variant = "paper",
        initial: Literal["random", "instance", "multiple"] = "random",
        neighbours: bool = True,
        ue: bool = True,
        aug: bool = True,
        ue_step: Annotated[float, Ge(0.0)] = 0.2,
        ue_period: Annotated[int, Ge(1)] = 80,
        ue_sign: Literal["attract", "eq12"] = "attract",
        chunk: Annotated[int, Ge(1)] = 8192,
        pool: Literal["avg", "flatten"] = "avg",
    ) -> None:
        super().__init__(encoder, setting)
        if setting.epochs % rounds:
            raise ValueError(f"rounds: {setting.epochs} epochs are not {rounds} rounds of equal length")
        self.temperature, self.aug_temperature, self.momentum = temperature, aug_temperature, momentum
        self.rounds, self.initial, self.variant = rounds, initial, variant
        self.neighbours, self.ue, self.aug = neighbours, ue, aug
        self.ue_step, self.ue_period, self.ue_sign = ue_step, ue_period, ue_sign
        self.head = Projection(pooled_size(encoder, pool), (), dim, dropout=0.0, norm="batch", pool=pool)
        self.bank = MemoryBank(setting.size, dim, setting.seed, chunk)
        self.tables["bank"] = self.bank
        if neighbours:
            self.tables["neighbour"] = SampleTable(setting.size, (), torch.int64, lambda ids: torch.full_like(ids, -1))
        self.looks_first = (
            neighbours and initial == "random"
        )  # neighbours in a bank that nothing was written to would be chance
        self.round, self.ue_weight, self.aug_weight = 0, 0.0, 1.0
        self.register_buffer("gram", torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer("begun", torch.tensor(-1))  # the round whose neighbours the table holds
        self.register_buffer("consistency", torch.tensor(0.0))
        self.register_buffer("entropy", torch.tensor(0.0))

    @classmethod
    def needs(cls, *, aug: bool = True, **parameters: Any) -> Needs:
        return Needs(views=2 if aug else 1)

    @classmethod
    def curves(cls, epochs: int, *, rounds: int = 5, neighbours: bool = True, **parameters: Any) -> tuple[Curve, ...]:
        """Figure 4 of the paper."""
        names = ("consistency", "entropy", "selected") if neighbours else ()
        return (
            (
                Curve(
                    "rounds",
                    "neighbourhoods as they were found at the start of each round",
                    names,
                    epochs // rounds,
                    "round",
                ),
            )
            if names
            else ()
        )

    def handed_on(self) -> dict[str, nn.Module]:
        return {"head": self.head}

    def begin_epoch(self, epoch: int) -> None:
        self.round, age = divmod(epoch, self.setting.epochs // self.rounds)
        plain = self.initial == "instance" and self.round == 0
        self.ue_weight = 0.0 if plain else self.ue_step * (age // self.ue_period)
        self.aug_weight = 0.0 if plain else 1.0
        if int(self.begun) != self.round:  # a round that is resumed in its middle has its neighbours
            if self.aug:
                self.gram.copy_(self.bank.gram())
            if self.neighbours and self._selected():
                self._discover()
            self.begun.fill_(self.round)

    def look(self, batch: Batch) -> None:
        self.bank.write(batch.rows, self.embed(batch)[0])

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, dim) on the unit sphere, for each view."""
        views = batch.views[: 2 if self.aug else 1]
        embedded: Tensor = self.head(self.encoder(torch.cat(views)))
        return embedded.chunk(len(views))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            memory = self.bank.read(batch.rows)
            losses = self._losses(outputs, batch.rows, memory.to(outputs[0].dtype))
            new = self.momentum * memory + (1.0 - self.momentum) * outputs[0].detach()
            self.bank.write(batch.rows, F.normalize(new, dim=1))
        return losses | self._told(outputs[0])

    def end_step(self) -> None:
        if self.aug:
            self.gram += self.bank.settle()
        super().end_step()

    def _losses(self, outputs: tuple[Tensor, ...], rows: Tensor, memory: Tensor) -> dict[str, Tensor]:
        """The three losses and their sum (eq. 6). `memory`: (B, dim), the bank's `rows` (B,)."""
        views = outputs if self.variant == "reference" else outputs[:1]
        count, queries = len(views), torch.cat(views)
        near, selected = self._neighbours(rows, memory)
        own_logit = REFERENCE_OWN_LOGIT if self.variant == "reference" else None
        others, entropy = self.bank.others(queries, rows.repeat(count), self.temperature, own_logit)
        own, beside = ((queries * m.repeat(count, 1)).sum(1) / self.temperature for m in (memory, near))
        losses = {"and_loss": neighbourhood_loss(others, own, beside, selected.repeat(count), self.variant)}
        total = losses["and_loss"]
        if self.ue:
            losses["ue_loss"] = entropy.mean() if self.ue_sign == "attract" else -entropy.mean()
            total = total + self.ue_weight * losses["ue_loss"]
        if self.aug:
            losses["aug_loss"] = self._augmentation_loss(*(v.to(self.gram.dtype) for v in outputs)).to(total.dtype)
            total = total + self.aug_weight * losses["aug_loss"]
        return {"loss": total, **losses}

    def _neighbours(self, rows: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim) the bank's rows of the neighbours, and (B,) which of them are selected."""
        if not self.neighbours:
            return memory, torch.zeros_like(rows, dtype=torch.bool)
        neighbour = self.tables["neighbour"].read(rows)
        return self.bank.read(neighbour.clamp_min(0)).to(memory.dtype), neighbour >= 0

    def _augmentation_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Over this worker's images, against those of the global batch. (B, dim) embeddings of both views."""
        place = torch.arange(len(first), device=first.device) + rank() * len(first)
        if self.variant == "paper":
            everyone = gather(first)
            across, among = (relation_cosines(view, everyone, self.gram) for view in (second, first))
            return paper_augmentation_loss(across, among, place, self.aug_temperature)
        everyone = torch.cat((gather(first.detach()), gather(second.detach())))
        there = place + len(everyone) // 2
        cosines = relation_cosines(torch.cat((first, second)), everyone, self.gram)
        return reference_augmentation_loss(
            cosines, torch.cat((place, there)), torch.cat((there, place)), self.aug_temperature
        )

    def _told(self, like: Tensor) -> dict[str, Tensor]:
        """What is logged beside the losses."""
        told = {"ue_weight": like.new_tensor(self.ue_weight)} if self.ue else {}
        if self.neighbours:
            told["selected"] = like.new_tensor(self._selected() / self.setting.size)
        if self.neighbours and self._selected():
            told["entropy"] = self.entropy.clone()
            if self.setting.labels is not None:
                told["consistency"] = self.consistency.clone()
        return told

    def _selected(self) -> int:
        """How many images have their neighbours selected in this round."""
        if self.initial == "random":
            return self.setting.size * (self.round + 1) // self.rounds
        return self.setting.size * self.round // max(self.rounds - 1, 1)

    def _discover(self) -> None:
        """Fill the table of neighbours: of the images of lowest entropy (eq. 9), of equal ones those of lowest id."""
        nearest, entropy = self.bank.discover(self.temperature)
        self.entropy.fill_(float(entropy.mean()))
        chosen = entropy.argsort(stable=True)[: self._selected()]
        neighbour = torch.full_like(nearest, -1)
        neighbour[chosen] = nearest[chosen]
        table = self.tables["neighbour"]
        table.rows.copy_(neighbour[table.ids])
        if self.setting.labels is not None:
            labels = self.setting.labels.to(neighbour.device)
            mine, theirs = labels[chosen], labels[nearest[chosen]]
            known = (mine >= 0) & (theirs >= 0)
            self.consistency.fill_(float(((mine == theirs) & known).sum()) / max(int(known.sum()), 1))
