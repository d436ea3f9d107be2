"""Super-AND (anonymous 2019), with Instance (Wu et al. 2018) and AND (Huang et al. 2019) as configurations of it.

Every image is one class: p_i^j, the softmax over j of m_j.v_i / tau (eq. 1), is the probability that the embedding v_i
belongs to image j. The memory bank M holds the last embeddings of all n images. Three losses are added (eq. 6):

    L_and   separates the image from all others, or, if it is selected, together with its nearest neighbour (eqs. 7-10)
    L_ue    the entropy of p_i without the image itself: nearby images attract each other (eqs. 11 and 12)
    L_aug   two views of an image have similar relations r = M v / |M v| to the whole bank, those of other images do not
            (eqs. 2, 13 and 14)

The training consists of rounds (Algorithm 1). Each begins with the discovery of all images' neighbours in the bank, and
selects the neighbours of those images whose p_i has the lowest entropy (eq. 9): more of them every round. r is never
computed: r_i.r_j = v_i G v_j / (|M v_i| |M v_j|) with the Gram matrix G = M^T M, which is updated at each step.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from firstlight.tasks import relation_losses
from firstlight.tasks.learner import Batch
from firstlight.tasks.memory_bank import MemoryBank, draw_spread_rows
from firstlight.tasks.neighbourhoods import measure_consistency, select_neighbours
from firstlight.tasks.nn.encoders import Encoder, MapPooling, pooled_size
from firstlight.tasks.nn.heads import Projection
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo
from firstlight.tasks.relation_losses import SuperAndVariant, augmentation_loss, neighbourhood_loss
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.visuals import Plot

# The types that a memory bank may be stored in.
BankType = Literal["float32", "float16", "bfloat16"]
BANK_TYPES: dict[BankType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# The fewest negatives: at most two of the drawn rows are an image's own (`draw_spread_rows`), so that one of three is
# of another image.
FEWEST_NEGATIVES = 3


class SuperAnd(Method):
    """The method with a memory bank and a projection head.

    The paper's text and the authors' code differ; each difference is a parameter or a case of `variant`:

                            variant: paper                             variant: reference
        L_and, L_ue over    the first view                             both views
        neighbour           of the nearest f(x) (eq. 7), which is      of the nearest row of the bank
                            computed again before each round
        entropy (eq. 9)     of p_i of f(x) (eq. 1)                     of p_i of the bank's row of i
        selected image      -log p_i^neighbour (eqs. 7 and 10)         -log(p_i^i + p_i^neighbour)
        own class in L_ue   left out (eq. 11)                          its logit is -10
        L_aug               eqs. 13 and 14: k = i in the sums,         no k = i in the sums; all pairs of both views;
                            views against first views, all r learn     the second factor is a constant

        ue_sign             attract: +H is minimised (section 3.2, and the code)      eq12: -H, as eq. 12 is printed
        ue_classes          others: the own class as above             all: it is a class like all others in L_ue, as in
                            the authors' first commit, which has the published log
        initial             random: (r + 1) / rounds of the images are selected in round r = 0, 1 .. (section 3.1),
                            first by f(x) of the untrained network, with which the bank begins (Algorithm 1, line 3)
                            instance, multiple: r / (rounds - 1), as in the code: the first round has no neighbours;
                            with `instance` it has neither L_ue nor L_aug (table 5)

    Table 1 has two readings: table 5 gives its 89.2 % to `random` and 89.1 % to `multiple`, but the authors' code knows
    `multiple` only, and its log ends with 89.2 % as well.

    The printed losses are sums over the batch; both variants take means, as the code does. The weight of L_ue is the
    number of whole `ue_period` epochs since the round began, times `ue_step`. The views pass the network as one batch
    (code); the training's `first_view` decides if the first is augmented too (code) or not (Algorithm 1). The bank
    takes the first view's embeddings, m <- norm(momentum m + (1 - momentum) v); the code writes both views to one row,
    and it is chance which one stays. f(x) is of the first view; images that fill no batch have their row of the bank.

    A round that selects images logs of its discovery `consistency`, the share of the selected images whose neighbour is
    of their class (figure 4), and `entropy`, the mean of eq. 9 over all images.

    Instance has `neighbours`, `ue` and `aug` off, AND has `ue` and `aug` off; both have one view.

    `dim`: the dimension of the embeddings (128 in section 3, in AND's code, and of Wu et al.).
    `temperature`: the temperature tau of the softmax over the bank (eqs. 1, 9 and 11). The paper does not say; 0.1 is
    in the authors' code, in AND's, and in that of Wu et al. for CIFAR-10.
    `aug_temperature`: the temperature of L_aug (eq. 13). The paper does not say; 0.1 is in the authors' code.
    `momentum`: the momentum of the memory bank (0.5 in section 4.1, in AND's code, and in that of Wu et al.).
    `rounds`: the number of rounds, which must divide the epochs; all of them are whole (5 of 200 epochs each in section
    4.1, and 5 in AND's code).
    `variant`: `paper` follows the paper's text, `reference` the authors' code, where they differ.
    `initial`: the selection of neighbours in the rounds: `random` (section 3.1 and table 5), `instance`, or `multiple`
    (the authors' code).
    `neighbours`: false makes every image its own class at all times.
    `ue`: true adds L_ue (section 3.2); false is an ablation of table 4.
    `aug`: true adds L_aug (section 3.3), which needs two views; false is an ablation of table 4.
    `views`: the number of views of an image, which is 2 also where `aug` is off. The second is made if a loss is over
    it: L_aug, or `variant: reference`.
    `ue_step`: the amount by which the weight of L_ue grows after every `ue_period`, from 0 on (0.2 in section 4.1).
    `ue_period`: the number of epochs after which the weight of L_ue grows (80 in section 4.1), counted from the
    beginning of a round (the authors' code).
    `ue_sign`: `attract` minimises the entropy of L_ue (section 3.2, and the code), `eq12` maximises it (eq. 12).
    `ue_classes`: the classes of L_ue: `others` treats the image's own as `variant` says (eq. 11), `all` includes it
    (the authors' first commit).
    `chunk`: the number of rows of the bank that are processed at a time; it changes memory, not results.
    `bank_dtype`: the type in which the bank is stored. The 16-bit types halve its memory; on the unit sphere float16 is
        the more exact of the two.
    `negatives`: the number of rows of the bank that the softmax of L_and and L_ue is estimated over, drawn in
        each step and shared by the batch; null: all rows. The search for neighbours and L_aug are exact in both cases.
    `pool`: the pooling of the feature map: `avg` is the mean over its positions, `flatten` keeps every position (`avg`
    in the authors' code).
    """

    title: ClassVar[str] = "Super-AND (Instance and AND are configurations of it)"
    paper: ClassVar[str] = (
        "Super-AND: anonymous, 2019, under review at ICLR 2020; Instance: Wu et al. 2018; AND: Huang et al. 2019"
    )
    reported_metrics: ClassVar[tuple[str, ...]] = ("consistency",)
    deviations: ClassVar[tuple[str, ...]] = (
        "Losses are means over the batch; in the paper they are sums.",
        "The paper's text and its authors' code differ; `variant`, `ue_sign`, `ue_classes` and `initial` say which was "
        "followed.",
        "Instance is learned with the softmax over all images, without noise-contrastive estimation.",
        "For kNN, an evaluation embeds the training images again; with `knn_bank: true` also over the bank (paper).",
        "The recipes drop the learning rate at epochs 120 and 160 of a round (authors' code), not from 80 on (paper).",
        "The memory bank takes the embeddings of the first view; in the authors' code, which view stays is chance.",
        "With `variant: paper`, an image that fills no batch of an epoch is searched for by its row of the bank.",
        "The authors report the best epoch on test images; here the last epoch counts. In the recipes, 2 % of the "
        "training images are held out to choose settings on; the authors train on all.",
        "The baselines Split-Brain, Counting, DeepCluster and ISIF of tables 1 and 2 are no methods here. The recipes "
        "have CUB-200 of 2011, the paper that of 2010; how AlexNet takes 32 pixels the paper does not say.",
    )

    gram: Tensor
    begun: Tensor
    consistency: Tensor
    entropy: Tensor

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        dim: Annotated[int, Ge(2)] = 128,
        temperature: Annotated[float, Gt(0.0)] = 0.1,
        aug_temperature: Annotated[float, Gt(0.0)] = 0.1,
        momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.5,
        rounds: Annotated[int, Ge(1)] = 5,
        variant: SuperAndVariant = "paper",
        initial: Literal["random", "instance", "multiple"] = "random",
        neighbours: bool = True,
        ue: bool = True,
        aug: bool = True,
        views: Literal[1, 2] = 2,
        ue_step: Annotated[float, Ge(0.0)] = 0.2,
        ue_period: Annotated[int, Ge(1)] = 80,
        ue_sign: Literal["attract", "eq12"] = "attract",
        ue_classes: Literal["others", "all"] = "others",
        chunk: Annotated[int, Ge(1)] = 8192,
        bank_dtype: BankType = "float32",
        negatives: Annotated[int, Ge(FEWEST_NEGATIVES)] | None = None,
        pool: MapPooling = "avg",
    ) -> None:
        super().__init__(encoder, info)
        if aug and views == 1:
            raise ValueError("views: 1 is not valid with aug: true, which compares two views; valid: 2")
        self.temperature, self.aug_temperature, self.momentum = temperature, aug_temperature, momentum
        self.rounds, self.initial, self.variant = rounds, initial, variant
        self.neighbours, self.ue, self.aug = neighbours, ue, aug
        self.ue_step, self.ue_period, self.ue_sign, self.ue_classes = ue_step, ue_period, ue_sign, ue_classes
        self.num_views = _count_views(aug, views, variant)
        self.head = Projection(pooled_size(encoder, pool), (), dim, dropout=0.0, norm="batch", pool=pool)
        self.bank = MemoryBank(info.size, dim, info.seed, chunk, BANK_TYPES[bank_dtype])
        self.negatives = negatives
        # The (negatives,) rows of the present step.
        self.sample: np.ndarray | None = None
        self.tables["bank"] = self.bank
        if neighbours:
            self.tables["neighbour"] = SampleTable(info.size, (), torch.int64, lambda rows: torch.full_like(rows, -1))
        # f(x) of all images. It is no state: it is filled and used between two rounds.
        self.features: SampleTable | None = None
        if neighbours and variant == "paper" and rounds > 1:
            self.features = SampleTable(info.size, (dim,), torch.float32, lambda rows: torch.zeros(len(rows), dim))
        self.has_features = False
        self.round, self.ue_weight, self.aug_weight = 0, 0.0, 1.0
        # The round that `begun` is known to have, without a look at the device.
        self.known_round: int | None = None
        self.register_buffer("gram", torch.zeros(dim, dim, dtype=torch.float64))
        # The round whose neighbours the table holds.
        self.register_buffer("begun", torch.tensor(-1))
        self.register_buffer("consistency", torch.tensor(0.0))
        self.register_buffer("entropy", torch.tensor(0.0))

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=_count_views(parameters["aug"], parameters["views"], parameters["variant"]))

    @classmethod
    def check_length(cls, epochs: int, ends_partial: bool, parameters: Mapping[str, Any]) -> None:
        if ends_partial or epochs % parameters["rounds"]:
            cut = ", the last one partial," if ends_partial else ""
            raise ValueError(f"rounds: {epochs} epochs{cut} are not {parameters['rounds']} rounds of equal length")

    @classmethod
    def check_images(cls, images: int, parameters: Mapping[str, Any]) -> None:
        negatives = parameters["negatives"]
        if negatives is not None and negatives >= images:
            raise ValueError(
                f"negatives: {negatives} rows are not fewer than the {images} images trained on; valid: null (all "
                f"rows), or {FEWEST_NEGATIVES}..{images - 1}"
            )

    @classmethod
    def plots(cls, epochs: int, parameters: Mapping[str, Any]) -> tuple[Plot, ...]:
        """Returns figure 4 of the paper; nothing if no neighbours are searched."""
        if not parameters["neighbours"]:
            return ()
        title, metrics = "neighbourhoods found at the start of each round", ("consistency", "entropy", "selected")
        return (Plot("rounds", title, metrics, epochs // parameters["rounds"], "round"),)

    def exported_networks(self) -> dict[str, nn.Module]:
        return {"head": self.head}

    def exported_tables(self) -> dict[str, SampleTable]:
        return {"bank": self.bank}

    def move_to_device(self, device: torch.device) -> None:
        super().move_to_device(device)
        if self.features is not None:
            self.features.to(device)

    def reads_images_before(self, epoch: int) -> bool:
        round_, age = divmod(epoch, self.info.epochs // self.rounds)
        searches = self.neighbours and age == 0 and self._count_selected(round_) > 0
        # Images are read before the first round in both variants: neighbours in a bank without embeddings would be
        # chance.
        return searches and (round_ == 0 or self.variant == "paper")

    def begin_epoch(self, epoch: int) -> None:
        """Sets the weights of the losses, and selects neighbours at the start of a round."""
        self.round, age = divmod(epoch, self.info.epochs // self.rounds)
        plain = self.initial == "instance" and self.round == 0
        self.ue_weight = 0.0 if plain else self.ue_step * (age // self.ue_period)
        self.aug_weight = 0.0 if plain else 1.0
        # A round that is resumed in its middle has its neighbours.
        if self.known_round != self.round and int(self.begun) != self.round:
            if self.aug:
                self.gram.copy_(self.bank.gram_matrix())
            if self.neighbours and self._count_selected(self.round):
                self._search_neighbours()
            self.begun.fill_(self.round)
        self.known_round = self.round

    def begin_step(self, step: int) -> None:
        """Draws the rows of the bank that the softmax of this step is estimated over, if it is not over all rows."""
        if self.negatives is not None:
            self.sample = draw_spread_rows(self.negatives, self.info.size, self.info.seed, step)

    def fill_tables(self, batch: Batch) -> None:
        """Writes f(x) of a batch: into the bank before the first round, and later where neighbours are searched."""
        found = self.embed(batch)[0]
        if self.features is None or int(self.begun) < 0:
            self.bank.write(batch.rows, found)
            return
        if not self.has_features:
            self.features.values.copy_(self.bank.values)
            self.has_features = True
        self.features.write(batch.rows, found)
        self.features.commit()

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, dim) embeddings on the unit sphere for each view."""
        views = batch.views[: self.num_views]
        embedded: Tensor = self.head(self.encoder(torch.cat(views)))
        return embedded.chunk(len(views))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            memory = self.bank.read(batch.rows)
            memory = memory.to(torch.promote_types(memory.dtype, torch.float32))
            losses = self._compute_losses(outputs, batch.rows, memory.to(outputs[0].dtype))
            new = self.momentum * memory + (1.0 - self.momentum) * outputs[0].detach()
            self.bank.write(batch.rows, F.normalize(new, dim=1))
        return losses | self._logged_values(outputs[0])

    def end_step(self) -> None:
        if self.aug:
            self.gram += self.bank.commit_gram_change()
        super().end_step()

    def _compute_losses(self, outputs: tuple[Tensor, ...], rows: Tensor, memory: Tensor) -> dict[str, Tensor]:
        """Returns the three losses and their sum (eq. 6). `memory`: the bank's (B, dim) embeddings of `rows` (B,)."""
        views = outputs if self.variant == "reference" else outputs[:1]
        count, queries = len(views), torch.cat(views)
        near, selected = self._read_neighbours(rows, memory)
        own_class: float | Tensor | None = relation_losses.REFERENCE_OWN_LOGIT if self.variant == "reference" else None
        if self.ue_classes == "all":
            own_class = memory.repeat(count, 1)
        others, entropy = self.bank.contrast_others(
            queries, rows.repeat(count), self.temperature, own_class, self.sample
        )
        own, neighbour = ((queries * m.repeat(count, 1)).sum(1) / self.temperature for m in (memory, near))
        losses = {"and_loss": neighbourhood_loss(others, own, neighbour, selected.repeat(count), self.variant)}
        total = losses["and_loss"]
        if self.ue:
            losses["ue_loss"] = entropy.mean() if self.ue_sign == "attract" else -entropy.mean()
            total = total + self.ue_weight * losses["ue_loss"]
        if self.aug:
            found = augmentation_loss(outputs[0], outputs[1], self.gram, self.aug_temperature, self.variant)
            losses["aug_loss"] = found.to(total.dtype)
            total = total + self.aug_weight * losses["aug_loss"]
        return {"loss": total, **losses}

    def _read_neighbours(self, rows: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (B, dim) embeddings of the neighbours, and (B,) bool, true if a neighbour is selected."""
        if not self.neighbours:
            return memory, torch.zeros_like(rows, dtype=torch.bool)
        neighbour = self.tables["neighbour"].read(rows)
        return self.bank.read(neighbour.clamp_min(0)).to(memory.dtype), neighbour >= 0

    def _logged_values(self, like: Tensor) -> dict[str, Tensor]:
        # A number that is made on the device: a copy of the host's would wait for a GPU.
        values = {"ue_weight": like.new_full((), self.ue_weight)} if self.ue else {}
        if self.neighbours:
            values["selected"] = like.new_full((), self._count_selected(self.round) / self.info.size)
        if self.neighbours and self._count_selected(self.round):
            values["entropy"] = self.entropy.clone()
            if self.info.labels is not None:
                values["consistency"] = self.consistency.clone()
        return values

    def _count_selected(self, round_: int) -> int:
        """Returns the number of images whose neighbours are selected in a round."""
        if self.initial == "random":
            return self.info.size * (round_ + 1) // self.rounds
        return self.info.size * round_ // max(self.rounds - 1, 1)

    def _search_neighbours(self) -> None:
        """Fills the table of neighbours for the images of lowest entropy."""
        nearest, entropy = self.bank.find_neighbours(self.temperature, self.features if self.has_features else None)
        self.has_features = False
        self.entropy.fill_(float(entropy.mean()))
        neighbour = select_neighbours(nearest, entropy, self._count_selected(self.round))
        table = self.tables["neighbour"]
        table.values.copy_(neighbour[table.own_rows])
        if self.info.labels is not None:
            self.consistency.fill_(measure_consistency(neighbour, self.info.labels.to(neighbour.device)))


def _count_views(aug: bool, views: int, variant: SuperAndVariant) -> int:
    """Returns the number of views that a loss is over."""
    return views if aug or variant == "reference" else 1
