"""Writes or opens the store of a recipe, with a line of progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.tracking.progress import ProgressCounter


@dataclass(frozen=True)
class RecipeStore:
    """A store, and whether lines about what was read for it were printed."""

    store: Store
    was_described: bool


def write_recipe_store(
    recipe: Recipe,
    side: int | None,
    source: Source | None,
    console: Console,
    on_ray: Callable[[], bool],
    is_busy: Callable[[], bool] = lambda: False,
    check: Callable[[], None] = lambda: None,
) -> RecipeStore:
    """Returns the store of `recipe.dataset`, see `prepare`.

    `side`: that of `find_recipe_side`. `source`: that of `recipe.dataset`, if it is open already. `on_ray` and
    `is_busy`: as `prepare`. `check` is called with each progress, and ends the work by an exception.

    Raises:
        UserError: as `prepare`.
    """
    progress, printed = ProgressCounter(console, "prepare"), list[str]()

    def tell(lines: Sequence[str]) -> None:
        printed.extend(lines)
        print_lines(console, lines)

    def show_count(done: int, total: int) -> None:
        check()
        progress.show_count(done, total)

    with progress:
        # A source that extends a store is opened with another test split.
        source = source if recipe.dataset.extends is None else None
        folder = recipe.storage.resolve() / "stores"
        store = prepare(recipe.dataset, folder, on_ray, show_count, tell, side, source, recipe.scale.cpus, is_busy)
        if store.extends:
            progress.remark = f" ({store.extends[-1].ids:,} of them in {store.extends[-1].name})"
    return RecipeStore(store, bool(printed))


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Prints lines about the images or the recipe, indented."""
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
