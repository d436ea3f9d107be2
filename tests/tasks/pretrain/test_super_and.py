import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.memory_bank import draw_spread_rows
from firstlight.tasks.pretrain import batch_requirements, metric_plots
from firstlight.tasks.pretrain.method import BatchRequirements, TrainingInfo
from firstlight.tasks.pretrain.super_and import SuperAnd
from tests.support import references
from tests.support.batches import batch_of_images, image_batch, number_otherwise, unit_rows
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.two_workers import assert_workers_equal_one

batch = partial(image_batch, dtype=torch.float64, views=2, ids=number_otherwise)

SIZE = 96
VARIANTS = pytest.mark.parametrize("variant", ["paper", "reference"])
INSTANCE: dict[str, Any] = {"neighbours": False, "ue": False, "aug": False, "views": 1}
AND: dict[str, Any] = {"ue": False, "aug": False, "views": 1, "initial": "instance"}
# The ablation of table 4: the losses are over both views, and L_aug is left out.
WITHOUT_AUG: dict[str, Any] = {"variant": "reference", "aug": False}


def method(
    size: int = SIZE, dtype: torch.dtype = torch.float64, norm: str = "group", epochs: int = 10, **options: Any
) -> SuperAnd:
    """The method with a bank of unit rows, the same on any number of workers."""
    info = TrainingInfo(size, epochs, seed=7, classes=3, labels=torch.arange(size) % 4 - 1)
    narrow = options.get("bank_dtype", "float32") != "float32"
    learner = build_method(SuperAnd, info, {"norm": norm}, dtype=dtype, **{"dim": 6, "chunk": 10, **options})
    learner.bank.values = unit_rows(size, 6, 1)[learner.bank.own_rows].to(
        learner.bank.values.dtype if narrow else dtype
    )
    return learner


def embedded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings of two views, near to their rows in the bank."""
    first = F.normalize(unit_rows(SIZE, 6, 1)[rows] + 0.5 * unit_rows(len(rows), 6, 2), dim=1)
    return first, F.normalize(first + 0.3 * unit_rows(len(rows), 6, 3), dim=1)


def trained(
    learner: SuperAnd, steps: list[int], per_epoch: int = 3, look: Callable[[int], None] = lambda step: None
) -> list[Tensor]:
    """Returns the losses of these steps, taken like in the training loop. `look` is called after each."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    losses = []
    for step in steps:
        if step % per_epoch == 0 or step == steps[0]:
            learner.begin_epoch(step // per_epoch)
        learner.begin_step(step)
        chosen = torch.randperm(SIZE, generator=torch.Generator().manual_seed(step))[:16]
        logged = learner(batch(chosen, dtype=learner.head.layers[0].weight.dtype))
        optimizer.zero_grad()
        logged["loss"].backward()
        optimizer.step()
        learner.end_step()
        losses.append(logged["loss"].detach())
        look(step)
    return losses


@pytest.mark.parametrize("ue_sign", ["attract", "eq12"])
@pytest.mark.parametrize("epoch", [0, 3, 9])
@VARIANTS
def test_the_losses_are_those_of_the_paper_or_of_the_code(variant: str, epoch: int, ue_sign: str) -> None:
    learner, rows = (
        method(variant=variant, ue_sign=ue_sign, ue_period=1, temperature=0.3, aug_temperature=0.2),
        torch.arange(0, 72, 6),
    )
    learner.begin_epoch(epoch)
    first, second = embedded(rows)
    logged = {name: float(value) for name, value in learner.loss((first, second), batch(rows)).items()}
    bank, own, code = learner.bank.values, rows.tolist(), variant == "reference"
    neighbour = learner.tables["neighbour"].values[rows].tolist()
    assert (-1 in neighbour) == (epoch < 8)
    views = [first, second] if code else [first]
    entropy = references.super_and_entropy(views, own, bank, 0.3, -10.0 if code else None)
    aug = references.super_and_augmentation_of_the_code if code else references.super_and_augmentation
    assert logged["and_loss"] == pytest.approx(
        references.super_and_neighbourhood(views, own, neighbour, bank, 0.3, code), rel=1e-10
    )
    assert logged["ue_loss"] == pytest.approx(entropy if ue_sign == "attract" else -entropy, rel=1e-10)
    assert logged["aug_loss"] == pytest.approx(aug(first, second, bank, 0.2), rel=1e-10)
    assert logged["ue_weight"] == pytest.approx(0.2 * (epoch % 2))
    assert logged["loss"] == pytest.approx(
        logged["and_loss"] + logged["ue_weight"] * logged["ue_loss"] + logged["aug_loss"], rel=1e-12
    )


def test_instance_is_the_cross_entropy_over_all_images() -> None:
    learner, rows = method(**INSTANCE, rounds=1), torch.arange(0, 72, 6)
    learner.begin_epoch(0)
    first, _ = embedded(rows)
    logged = learner.loss((first,), batch(rows, views=1))
    assert sorted(logged) == ["and_loss", "loss"]
    assert float(logged["loss"]) == pytest.approx(
        float(F.cross_entropy(first @ learner.bank.values.T / 0.1, rows)), rel=1e-10
    )


def test_and_equals_instance_in_the_first_round_only() -> None:
    learner, instance, rows = method(**AND, variant="reference"), method(**INSTANCE), torch.arange(0, 72, 6)
    first, _ = embedded(rows)
    losses = []
    for epoch in (0, 2):
        for each in (learner, instance):
            each.begin_epoch(epoch)
        losses.append([float(each.loss((first,), batch(rows, views=1))["loss"]) for each in (learner, instance)])
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] < losses[1][1]


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, 2),
        ({"variant": "reference"}, 2),
        (WITHOUT_AUG, 2),
        ({**WITHOUT_AUG, "views": 1}, 1),
        ({"variant": "paper", "aug": False}, 1),
        (AND, 1),
        ({**AND, "variant": "reference"}, 1),
        (INSTANCE, 1),
    ],
)
def test_batches_have_as_many_views_as_the_losses_are_over(options: dict[str, Any], views: int) -> None:
    """No loss of the paper but L_aug reads the second view."""
    assert batch_requirements("super_and", options) == BatchRequirements(views=views)
    assert len(method(**options).embed(batch(torch.arange(4)))) == views


def test_augmentation_loss_of_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^views: 1 is not valid with aug: true, .*; valid: 2$"):
        method(views=1)


def test_ablation_without_augmentation_loss_keeps_both_views() -> None:
    """L_and and L_ue are those of the full method: only L_aug is missing."""
    rows, logged = torch.arange(0, 72, 6), []
    for options in ({"variant": "reference"}, WITHOUT_AUG, {**WITHOUT_AUG, "views": 1}):
        learner = method(ue_period=1, **options)
        learner.begin_epoch(5)
        outputs = embedded(rows)[: learner.num_views]
        logged.append({name: float(value) for name, value in learner.loss(outputs, batch(rows)).items()})
    full, ablated, one_view = logged
    assert full.keys() - ablated.keys() == {"aug_loss"}
    assert [ablated[name] for name in ("and_loss", "ue_loss")] == [full[name] for name in ("and_loss", "ue_loss")]
    assert ablated["loss"] == pytest.approx(full["loss"] - full["aug_loss"], rel=1e-12)
    assert abs(one_view["and_loss"] - ablated["and_loss"]) > 1e-3


@VARIANTS
def test_entropy_over_all_classes_includes_the_own_one(variant: str) -> None:
    learner, rows = method(variant=variant, ue_classes="all", ue_period=1, temperature=0.3), torch.arange(0, 72, 6)
    learner.begin_epoch(5)
    views = embedded(rows)
    logged = learner.loss(views, batch(rows))
    used = list(views) if variant == "reference" else [views[0]]
    wanted = references.super_and_entropy(used, rows.tolist(), learner.bank.values, 0.3, "all")
    assert float(logged["ue_loss"]) == pytest.approx(wanted, rel=1e-10)


def naive_loss(learner: SuperAnd, first: Tensor, second: Tensor, rows: Tensor, code: bool, over_all: bool) -> Tensor:
    """The loss from (b, n) tensors and n-dimensional relations, for autograd in float64.

    `over_all` makes the own class one of L_ue.
    """
    bank = learner.bank.values.double()
    views = torch.cat((first, second)) if code else first
    own = rows.repeat(len(views) // len(rows))
    logits, itself = views @ bank.T / 0.1, F.one_hot(own, len(bank)).bool()
    near = learner.tables["neighbour"].values[own]
    p = logits.softmax(1)
    own_p, near_p = (p.gather(1, column[:, None])[:, 0] for column in (own, near.clamp_min(0)))
    loss = -torch.where(near >= 0, near_p + own_p * code, own_p).log().mean()
    hidden = -10.0 if code else -1e9
    log_q = (logits if over_all else logits.masked_fill(itself, hidden)).log_softmax(1)
    loss = loss - learner.ue_weight * (log_q.exp() * log_q).sum(1).mean()
    r, hat = (F.normalize(view @ bank.T, dim=1) for view in (first, second))
    if not code:
        b = len(rows)
        missed = torch.log(1 - (r @ r.T / 0.1).softmax(1)).masked_fill(torch.eye(b).bool(), 0)
        return loss - missed.sum(1).mean() - (hat @ r.T / 0.1).log_softmax(1).diagonal().mean()
    x = torch.cat((r, hat))
    positive = F.one_hot(torch.arange(len(x)).roll(len(r)), len(x)).bool()
    log_p = (x @ x.detach().T / 0.1).masked_fill(torch.eye(len(x)).bool(), -1e9).log_softmax(1)
    return loss - (torch.where(positive, log_p, torch.log(1 - log_p.exp()))).sum(1).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("ue_classes", ["others", "all"])
@VARIANTS
def test_loss_and_gradient_are_those_of_the_naive_form(
    variant: str, ue_classes: str, dtype: torch.dtype, tolerance: float
) -> None:
    learner = method(dtype=dtype, variant=variant, ue_period=1, ue_classes=ue_classes)
    rows = torch.arange(0, 72, 3)
    learner.begin_epoch(5)
    wide = [x.to(dtype).double().requires_grad_() for x in embedded(rows)]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]
    wanted, found = (
        naive_loss(learner, *wide, rows, variant == "reference", ue_classes == "all"),
        learner.loss(tuple(narrow), batch(rows))["loss"],
    )
    (wanted_gradient, gradient) = (
        torch.cat(torch.autograd.grad(loss, of)) for loss, of in ((wanted, wide), (found, narrow))
    )
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance)
    assert (gradient - wanted_gradient).norm() <= tolerance * wanted_gradient.norm()


@VARIANTS
def test_sampled_loss_is_the_naive_form_over_the_drawn_rows(variant: str) -> None:
    """L_and and L_ue have the drawn rows, each 96 / 30 times, in the place of all others; L_aug is exact."""
    learner, whole = (method(variant=variant, ue_period=1, negatives=negatives) for negatives in (30, None))
    rows, code = torch.arange(0, 72, 3), variant == "reference"
    for one in (learner, whole):
        one.begin_epoch(5)
        one.begin_step(4)
    views = [x.requires_grad_() for x in embedded(rows)]
    drawn = torch.from_numpy(draw_spread_rows(30, SIZE, learner.info.seed, 4))
    queries, own = torch.cat(views) if code else views[0], rows.repeat(1 + code)
    bank, near = learner.bank.values, learner.tables["neighbour"].values[own]
    others = (queries @ bank[drawn].T / 0.1).exp() * SIZE / 30 * (own[:, None] != drawn)
    itself, neighbour = ((queries * bank[at]).sum(1) / 0.1 for at in (own, near.clamp_min(0)))
    both = neighbour.exp() + itself.exp() * code
    total = others.sum(1) + itself.exp()
    and_loss = -(torch.where(near >= 0, both, itself.exp()) / total).log().mean()
    constant = torch.exp(torch.tensor(-10.0, dtype=torch.float64)) * code
    q, z = others, others.sum(1) + constant
    mean_logit = ((q * (queries @ bank[drawn].T / 0.1)).sum(1) - 10.0 * constant) / z
    wanted = {"and_loss": and_loss, "ue_loss": (z.log() - mean_logit).mean()}
    found, exact = (one.loss(tuple(views), batch(rows)) for one in (learner, whole))
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-9)
        assert exact[name].item() != pytest.approx(value.item(), rel=1e-3)
    assert found["aug_loss"].item() == exact["aug_loss"].item()
    total_loss = wanted["and_loss"] + learner.ue_weight * wanted["ue_loss"] + found["aug_loss"]
    gradients = [torch.cat(torch.autograd.grad(loss, views, retain_graph=True)) for loss in (found["loss"], total_loss)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("variant", "bound"), [("paper", 2e-3), ("reference", 2e-3)])
@pytest.mark.parametrize(("bank_dtype", "factor"), [("float16", 1.0), ("bfloat16", 8.0)])
def test_bank_in_16_bits_is_close_to_the_exact_loss(variant: str, bound: float, bank_dtype: str, factor: float) -> None:
    """The gradient is off by less than two in a thousand with float16, and eight times that with bfloat16."""
    rows = torch.arange(0, 72, 3)
    gradients = []
    for options in ({}, {"bank_dtype": bank_dtype}):
        learner = method(dtype=torch.float32, variant=variant, ue_period=1, **options)
        learner.begin_epoch(5)
        views = [x.float().requires_grad_() for x in embedded(rows)]
        loss = learner.loss(tuple(views), batch(rows))["loss"]
        gradients.append(torch.cat(torch.autograd.grad(loss, views)))
        learner.end_step()
        assert learner.bank.values.dtype == getattr(torch, options.get("bank_dtype", "float32"))
    exact, found = gradients
    assert 0 < (found - exact).norm() <= factor * bound * exact.norm()


@pytest.mark.parametrize("negatives", [None, SIZE - 1, SIZE, SIZE + 1])
def test_more_drawn_rows_than_images_are_refused(negatives: int | None) -> None:
    if negatives is None or negatives < SIZE:
        SuperAnd.check_images(SIZE, {"negatives": negatives})
        return
    with pytest.raises(ValueError, match=rf"^negatives: {negatives} rows are not fewer than the 96 images .*: null"):
        SuperAnd.check_images(SIZE, {"negatives": negatives})


@pytest.mark.parametrize("ue_classes", ["others", "all"])
def test_gradcheck_of_the_paper_loss(ue_classes: str) -> None:
    learner = method(ue_period=1, temperature=0.5, aug_temperature=0.5, ue_classes=ue_classes)
    rows = torch.arange(0, 20, 5)
    learner.begin_epoch(5)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        found = learner.loss((F.normalize(first, dim=1), F.normalize(second, dim=1)), batch(rows))["loss"]
        learner.bank._pending.clear()
        return found

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in embedded(rows)])


@VARIANTS
def test_loss_does_not_depend_on_the_order_of_the_batch(variant: str) -> None:
    learner, rows = method(variant=variant, ue_period=1), torch.arange(0, 72, 3)
    learner.begin_epoch(5)
    order = torch.randperm(len(rows))
    logged = [learner(batch(r))["loss"].detach() for r in (rows, rows[order])]
    assert float(logged[1]) == pytest.approx(float(logged[0]), rel=1e-10)


def test_reference_variant_treats_both_views_alike() -> None:
    learner, rows = method(variant="reference", ue_period=1), torch.arange(0, 72, 3)
    learner.begin_epoch(5)
    first, second = embedded(rows)
    logged = [float(learner.loss(views, batch(rows))["loss"]) for views in ((first, second), (second, first))]
    assert logged[1] == pytest.approx(logged[0], rel=1e-12)


@pytest.mark.fault(38, "zeros, equal images, huge values: Super-AND")
@VARIANTS
@pytest.mark.parametrize("images", ["constant", "equal"])
def test_constant_and_equal_images_have_finite_losses(images: str, variant: str) -> None:
    learner = method(dtype=torch.float32, variant=variant, ue_period=1)
    pixels = torch.zeros(16, 3, 8, 8) if images == "constant" else torch.rand(1, 3, 8, 8).expand(16, -1, -1, -1)
    for epoch in (0, 9):
        learner.begin_epoch(epoch)
        losses = learner(batch_of_images((pixels, pixels)))
        losses["loss"].backward()
        assert all(torch.isfinite(value).all() for value in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in learner.parameters() if p.grad is not None)


@VARIANTS
def test_certain_confusion_with_another_image_is_finite(variant: str) -> None:
    """The probability of the other image rounds to 1, and log(1 - p) of it is not finite."""
    learner, rows = method(variant=variant, aug_temperature=0.0001), torch.tensor([3, 40])
    learner.begin_epoch(9)
    first, second = embedded(rows)
    views = tuple(v.clone().requires_grad_() for v in (first[:1].expand(2, -1), second))
    loss = learner.loss(views, batch(rows))["loss"]
    assert torch.isfinite(torch.stack([loss, *(g.abs().sum() for g in torch.autograd.grad(loss, views))])).all()


@pytest.mark.parametrize(
    ("initial", "wanted"),
    [("random", [19, 38, 57, 76, 96]), ("multiple", [0, 24, 48, 72, 96]), ("instance", [0, 24, 48, 72, 96])],
)
def test_each_round_selects_more_images_by_lowest_entropy(initial: str, wanted: list[int]) -> None:
    learner = method(initial=initial)
    nearest, entropy = references.super_and_neighbours(learner.bank.values, 0.1)
    order = sorted(range(SIZE), key=lambda i: entropy[i])
    for epoch in range(10):
        learner.begin_epoch(epoch)
        chosen = order[: wanted[epoch // 2]]
        neighbour = learner.tables["neighbour"].values.tolist()
        assert neighbour == [nearest[i] if i in chosen else -1 for i in range(SIZE)]
        logged = learner(batch(torch.arange(8)))
        assert float(logged["selected"]) == pytest.approx(len(chosen) / SIZE)
        assert ("consistency" in logged) == ("entropy" in logged) == bool(chosen), (
            "nothing is known of neighbours that were not looked for"
        )
        if not chosen:
            continue
        assert float(logged["entropy"]) == pytest.approx(sum(entropy) / SIZE, rel=1e-6)
        known = [i for i in chosen if i % 4 and nearest[i] % 4]  # labels are i % 4 - 1
        wanted_consistency = sum(i % 4 == nearest[i] % 4 for i in known) / max(len(known), 1)
        assert float(logged["consistency"]) == pytest.approx(wanted_consistency)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"initial": "random"}, [0, 2, 4, 6, 8]),
        ({"initial": "multiple"}, [2, 4, 6, 8]),
        ({"initial": "random", "variant": "reference"}, [0]),
        ({"initial": "multiple", "variant": "reference"}, []),
        (INSTANCE, []),
    ],
)
def test_all_images_are_read_before_rounds_that_search_by_features(options: dict[str, Any], wanted: list[int]) -> None:
    learner = method(**options)
    assert [epoch for epoch in range(10) if learner.reads_images_before(epoch)] == wanted


def test_paper_searches_neighbours_by_features_of_the_present_network() -> None:
    """Eqs. 7 and 9. Images that were not read are searched for by their row of the bank."""
    learner, rows = method(temperature=0.3).eval(), torch.arange(8, SIZE)
    learner.begin_epoch(1)
    assert learner.features is not None
    learner.features.values = learner.features.values.double()
    with torch.no_grad():
        for part in rows.split(40):
            learner.fill_tables(batch(part))
            learner.end_step()
        wanted = torch.cat((learner.bank.values[:8], learner.embed(batch(rows))[0]))
    before = learner.bank.values.clone()
    assert torch.equal(learner.bank.values, before)
    learner.begin_epoch(2)
    nearest, entropy = references.super_and_neighbours(before, 0.3, wanted)
    chosen = sorted(range(SIZE), key=lambda i: entropy[i])[: 2 * SIZE // 5]
    assert learner.tables["neighbour"].values.tolist() == [nearest[i] if i in chosen else -1 for i in range(SIZE)]
    assert float(learner.entropy) == pytest.approx(sum(entropy) / SIZE, rel=1e-6)
    of_bank = references.super_and_neighbours(before, 0.3)[0]
    assert [nearest[i] for i in chosen] != [of_bank[i] for i in chosen]


@VARIANTS
def test_bank_is_exported_and_features_are_not_saved(variant: str) -> None:
    learner = method(variant=variant)
    assert learner.exported_tables() == {"bank": learner.bank}
    assert learner.tables.keys() == {"bank", "neighbour"}


def test_rounds_have_a_plot_only_with_neighbours() -> None:
    (plot,) = metric_plots("super_and", 20, {"rounds": 4})
    assert (plot.numbers, plot.every, plot.unit) == (("consistency", "entropy", "selected"), 5, "round")
    assert metric_plots("super_and", 20, {"rounds": 1, "neighbours": False}) == ()


def test_equal_entropies_are_selected_by_id() -> None:
    learner = method()
    learner.bank.values = F.one_hot(torch.arange(SIZE) % 6, 6).double()
    learner.begin_epoch(0)
    assert (learner.tables["neighbour"].values >= 0).nonzero()[:, 0].tolist() == list(range(SIZE // 5))


@pytest.mark.parametrize("initial", ["random", "instance", "multiple"])
def test_training_of_one_round_works(initial: str) -> None:
    learner = method(rounds=1, initial=initial)
    assert torch.isfinite(torch.stack(trained(learner, [0, 1, 2]))).all()
    assert int((learner.tables["neighbour"].values >= 0).sum()) == (SIZE if initial == "random" else 0)


@pytest.mark.parametrize(
    ("epochs", "ends_partial", "problem"),
    [(9, False, ""), (3, False, ""), (10, False, "10 epochs are"), (9, True, "9 epochs, the last one partial, are")],
)
def test_rounds_that_do_not_fit_the_epochs_are_refused(epochs: int, ends_partial: bool, problem: str) -> None:
    if not problem:
        SuperAnd.check_length(epochs, ends_partial, {"rounds": 3})
        return
    with pytest.raises(ValueError, match=f"^rounds: {problem} not 3 rounds of equal length$"):
        SuperAnd.check_length(epochs, ends_partial, {"rounds": 3})


def test_the_weight_of_the_entropy_grows_within_a_round() -> None:
    learner = method(epochs=1000)
    wanted = {0: 0.0, 79: 0.0, 80: 0.2, 159: 0.2, 160: 0.4, 199: 0.4, 200: 0.0, 480: 0.2, 999: 0.4}
    for epoch, weight in wanted.items():
        learner.begun.fill_(epoch // 200)
        learner.begin_epoch(epoch)
        assert learner.ue_weight == pytest.approx(weight)


@pytest.mark.parametrize(("initial", "both"), [("instance", False), ("multiple", True), ("random", True)])
def test_the_first_round_of_an_instance_start_has_one_loss(initial: str, both: bool) -> None:
    learner = method(initial=initial, ue_period=1)
    logged = []
    for epoch in (1, 3):
        learner.begin_epoch(epoch)
        logged.append({name: float(value.detach()) for name, value in learner(batch(torch.arange(16))).items()})
    of_neighbours = {"entropy", "consistency"}
    assert logged[0].keys() - of_neighbours == logged[1].keys() - of_neighbours
    for values, on in zip(logged, (both, True), strict=True):
        rest = 0.2 * values["ue_loss"] + values["aug_loss"] if on else 0.0
        assert values["loss"] == pytest.approx(values["and_loss"] + rest)


def test_bank_stores_the_first_view_after_the_step() -> None:
    learner, rows = method(momentum=0.7), torch.tensor([5, 80, 2])
    learner.begin_epoch(0)
    before = learner.bank.values.clone()
    first, second = embedded(rows)
    learner.loss((first, second), batch(rows))
    assert torch.equal(learner.bank.values, before)
    learner.end_step()
    wanted = before.clone()
    for row, v in zip(rows, first, strict=True):
        mixed = 0.7 * before[row] + 0.3 * v
        wanted[row] = mixed / mixed.norm()
    torch.testing.assert_close(learner.bank.values, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learner.gram, wanted.T @ wanted, rtol=1e-12, atol=1e-12)


def test_labels_reach_no_loss() -> None:
    ends = []
    for labels in (torch.arange(SIZE) % 3, torch.full((SIZE,), -1), None):
        learner = method()
        learner.info = TrainingInfo(SIZE, 10, 7, 3, labels)
        losses = trained(learner, list(range(12)))
        ends.append([*losses, *(p.detach() for p in learner.parameters()), learner.bank.values])
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


RESUMED: dict[str, dict[str, Any]] = {
    "paper": {"variant": "paper"},
    "reference": {"variant": "reference"},
    "sampled": {"negatives": 20, "bank_dtype": "float16"},
}
RESUMED_STEPS = 14


def save_state(learner: SuperAnd) -> dict[str, Any]:
    """Returns a copy of the learner's state, and of that of each table by its name."""
    tables = {name: table.state_dict() for name, table in learner.tables.items()}
    return copy.deepcopy({"learner": learner.state_dict(), "tables": tables})


def build_resumed(name: str) -> SuperAnd:
    return method(dtype=torch.float32, ue_period=1, **RESUMED[name])


@cache
def train_uninterrupted(name: str) -> tuple[SuperAnd, list[dict[str, Any]]]:
    """Returns the method after all steps, and its state after each."""
    learner, states = build_resumed(name), []
    trained(learner, list(range(RESUMED_STEPS)), look=lambda step: states.append(save_state(learner)))
    return learner, states


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("cut", [1, 3, 4, 6, 7, 11])
def test_resumed_equals_uninterrupted_bit_by_bit(name: str, cut: int) -> None:
    """Rounds have two epochs of three steps: 6 is the end of a round, 3 the end of an epoch inside a round.

    The other cuts are inside epochs.
    """
    whole, states = train_uninterrupted(name)
    state, resumed = copy.deepcopy(states[cut - 1]), build_resumed(name)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1.0)
    resumed.load_state_dict(state["learner"])
    for table, saved in state["tables"].items():
        resumed.tables[table].load_state_dicts([saved])
    trained(resumed, list(range(cut, RESUMED_STEPS)))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for key, table in whole.tables.items():
        assert torch.equal(table.values, resumed.tables[key].values), key


@VARIANTS
@pytest.mark.parametrize("size", [5, 8])
def test_batch_embedded_in_parts_has_loss_and_gradient_of_whole(variant: str, size: int) -> None:
    learner, whole = method(variant=variant, ue_period=1), batch(torch.arange(0, 72, 3))
    learner.begin_epoch(5)
    parts = [learner.embed(whole.select_range(start, min(start + size, 24))) for start in range(0, 24, size)]
    found = []
    for outputs in (learner.embed(whole), tuple(torch.cat(views) for views in zip(*parts, strict=True))):
        loss = learner.loss(outputs, whole)["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, list(learner.parameters()))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


CONFIGURATIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "reference", "initial": "multiple"},
        {"variant": "reference", "initial": "multiple", "ue_classes": "all"},
        WITHOUT_AUG,
        AND,
        {"negatives": 20},
    ],
    ids=["paper", "reference", "first commit", "without aug", "and", "sampled"],
)


@pytest.mark.parametrize("norm", ["group", "sync"])
@pytest.mark.parametrize(("workers", "images"), [("pool", 64), ("pool3", 48)])
@CONFIGURATIONS
def test_two_steps_of_a_round_on_workers_equal_those_on_one(
    options: dict[str, Any], workers: str, images: int, norm: str, request: pytest.FixtureRequest
) -> None:
    """The losses, gradients, tables and the Gram matrix are equal after two steps of the second round."""
    pool: Pool = request.getfixturevalue(workers)
    views = options.get("views", 2)
    steps = [batch((torch.arange(images) + 5 * step) * 7 % SIZE, views=views) for step in range(2)]
    one = assert_workers_equal_one(
        pool, partial(method, norm=norm, ue_period=1, **options), *steps, epoch=3, loss_rtol=1e-8, atol=1e-11
    )
    assert {"bank", "neighbour"} == one.tables.keys()
    assert "gram" in one.buffers


def search_on_this_worker() -> list[Tensor]:
    """The neighbours and their mean entropy after all images were read, this worker its part of each batch."""
    learner = method(temperature=0.3).eval()
    learner.begin_epoch(1)
    assert learner.features is not None
    learner.features.values = learner.features.values.double()
    with torch.no_grad():
        for part in torch.arange(SIZE).split(48):
            size = len(part) // world_size()
            learner.fill_tables(batch(part[rank() * size : (rank() + 1) * size]))
            learner.end_step()
    learner.begin_epoch(2)
    return [learner.tables["neighbour"].gather_values(), learner.entropy]


@pytest.mark.parametrize("workers", ["pool", "pool3"])
def test_neighbours_by_features_do_not_depend_on_the_number_of_workers(
    workers: str, request: pytest.FixtureRequest
) -> None:
    neighbour, entropy = search_on_this_worker()
    for found in request.getfixturevalue(workers).run(search_on_this_worker):
        assert torch.equal(found[0], neighbour)
        torch.testing.assert_close(found[1], entropy)
