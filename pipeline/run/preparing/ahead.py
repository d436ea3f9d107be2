"""The store of a recipe, which a thread writes while this process imports torch, checks the recipe and opens MLflow.

On one machine nothing of that is needed for the images. A mistake that is found meanwhile ends the writing; the parts
that are finished are kept.
"""

import contextlib
import threading
from collections.abc import Iterator

from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.mirror.places import find_mirror
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.files import exclusive_lock
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.run.preparing.recipe_store import RecipeStore, write_recipe_store
from firstlight.pipeline.run.preparing.storage import check_storage
from firstlight.pipeline.tracking.connection import check_uri
from firstlight.pipeline.tracking.location import TrackingLocation

# Seconds that a mistake waits for the end of the writing, which may hang in a storage. Other processes end with this.
STOP_TIMEOUT_S = 2.0


class _Abandoned(Exception):
    """The store is not wanted any more."""


class StoreAhead:
    """The store of a recipe that is being written. `source`: the listing of its images, until it is taken."""

    def __init__(self, recipe: Recipe, source: Source, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.source: Source | None = source
        self.side: int | None = None
        self.abandoned, self.is_waited_for = threading.Event(), threading.Event()
        self.result: RecipeStore | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._write, args=(source,), daemon=True, name="store")

    def start(self) -> None:
        """Begins to write the store."""
        self.side = find_recipe_side(self.recipe)
        self.thread.start()

    def take_source(self) -> Source | None:
        """Returns the listing of the images, which this object then lets go: of many files it is large."""
        source, self.source = self.source, None
        return source

    def finish(self, side: int | None) -> RecipeStore | None:
        """Waits for the store, and returns it; None if a store of another `side` is wanted.

        Raises:
            UserError: as `prepare`.
        """
        if side != self.side:
            self.stop()
            return None
        self.is_waited_for.set()
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.result

    def stop(self) -> None:
        """Ends the writing, if it has not finished."""
        self.abandoned.set()
        if self.thread.ident is not None:
            self.thread.join(STOP_TIMEOUT_S)

    def _write(self, source: Source) -> None:
        try:
            self.result = write_recipe_store(
                *(self.recipe, self.side, source, self.console),
                on_ray=lambda: False,
                is_busy=lambda: not self.is_waited_for.is_set(),
                check=self._check_wanted,
            )
        except BaseException as error:
            self.error = error

    def _check_wanted(self) -> None:
        if self.abandoned.is_set():
            raise _Abandoned


@contextlib.contextmanager
def write_ahead(recipe: Recipe, console: Console, only: str | None) -> Iterator[StoreAhead | None]:
    """Begins to write the store of a recipe that is run on this machine, and ends that with the block.

    Yields None where another machine may write it, or where other stores are read first. `only`: see `run_recipe`.
    The lock of the recipe is held for the block.

    Raises:
        UserError: a mistake in the source, the storage, `tracking.uri` or the kind of the stages; another process runs
            the recipe.
    """
    check_kind(recipe, only)
    if not _is_written_here(recipe):
        yield None
        return
    check_uri(TrackingLocation.of(recipe).uri)
    check_storage(recipe.storage)
    ahead = StoreAhead(recipe, open_source(recipe.dataset), console)
    with exclusive_lock(recipe.storage.resolve() / recipe.name, recipe.name):
        ahead.start()
        try:
            yield ahead
        finally:
            ahead.stop()


def _is_written_here(recipe: Recipe) -> bool:
    return (
        recipe.scale.address == "local"
        and recipe.encoder is not None
        and recipe.dataset.extends is None
        and find_mirror(recipe.storage) is None
    )


def check_kind(recipe: Recipe, only: str | None) -> None:
    """Checks that a recipe has a stage of the kind that a command is to run.

    Raises:
        UserError: it has none; names the kinds that it has.
    """
    kinds = [stage.kind for stage in recipe.stages.values()]
    if only not in (None, "prepare", *kinds):
        raise UserError(
            f"stages: the recipe {recipe.name} has no stage of the kind {only}; "
            f"{suggest_valid(str(only), dict.fromkeys(kinds))}; stages.{only}={{}} adds one"
        )
