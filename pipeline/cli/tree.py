"""`firstlight show`: the ancestors and descendants of a run as a tree, from the data to the models."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from firstlight.pipeline.cli.history import RUN_STATE_STYLES, elapsed_seconds, run_state, trial_results
from firstlight.pipeline.data.mirror.places import find_mirror
from firstlight.pipeline.report.run_scores import format_image_counts, format_scores
from firstlight.pipeline.terminal import Column, build_table, format_ago, format_duration
from firstlight.pipeline.tracking.lineage import SHORT_ID_LENGTH, Lineage, Run, collect_ids

TRIAL_COLUMNS = (
    Column("trial"),
    Column("id", fixed=True),
    Column("state", fixed=True),
    Column("scores"),
    Column("encoder"),
)


def build_run_view(lineage: Lineage, run: Run, now: float) -> Group:
    """Returns the view of a run; `now` is in seconds since 1970.

    It has all stages of a recipe, all trials of a search, or the ancestors, the descendants and the inputs of a stage.
    """
    parts: list[RenderableType] = [_format_head(lineage, run, now)]
    if run.kind == "search":
        parts.append(_all_trials_table(lineage, run))
    else:
        parts += [_build_tree(lineage, group, run) for group in _group_by_store(related_stages(lineage, run))]
    if not run.is_composite:
        parts.append(_inputs_table(lineage, run))
    return Group(*parts)


def related_stages(lineage: Lineage, run: Run) -> list[Run]:
    """Returns the stages of the tree: those of the run, the ones that made their encoders, and all descendants.

    The stages of a recipe are its own, and the stages of a prepare run are all that read its store.
    """
    if run.is_composite:
        chosen = lineage.list_stages(run)
    elif run.kind == "prepare":
        chosen = [other for other in lineage.runs.values() if other.store == run.store and not other.is_composite]
    else:
        chosen = [run]
    found = {one.id: one for one in chosen}
    for one in chosen:
        source = lineage.find_source(one)
        if source:
            found[source.id] = source
    waiting = list(chosen)
    while waiting:
        for consumer in lineage.list_consumers(waiting.pop()):
            if consumer.id not in found:
                found[consumer.id] = consumer
                waiting.append(consumer)
    return sorted((one for one in found.values() if one.kind != "prepare"), key=lambda one: one.start)


def _group_by_store(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.store, []).append(run)
    return list(groups.values())


def _format_head(lineage: Lineage, run: Run, now: float) -> Text:
    seconds = elapsed_seconds(run)
    out = Text.assemble((run.name, "bold"), f"  {run.kind} ", (run.id, "dim"), "\n", _format_state(lineage, run))
    out.append(f", started {format_ago(now - run.start)}")
    out.append("" if seconds is None else f", took {format_duration(seconds)}")
    recipe = lineage.find_recipe(run)
    if recipe:
        out.append(f", of {recipe.name} ({recipe.short_id})")
    repeats = run.tags.get("firstlight.repeats")
    if repeats:
        out.append(f", repeats {repeats[:SHORT_ID_LENGTH]}")
    return out


def _format_state(lineage: Lineage, run: Run) -> Text:
    state = run_state(lineage, run)
    return Text(state, RUN_STATE_STYLES.get(state, "yellow"))


def _build_tree(lineage: Lineage, runs: Sequence[Run], selected: Run) -> Tree:
    """Returns the tree of runs that read the same store, with the store as its root."""
    tree = Tree(_format_store(lineage, runs[0].store), guide_style="dim")
    here = collect_ids(runs)
    for run in runs:
        if lineage.find_source_id(run) not in here:
            _add_stage(tree, lineage, run, runs, selected)
    return tree


def _add_stage(tree: Tree, lineage: Lineage, run: Run, runs: Sequence[Run], selected: Run) -> None:
    node = tree.add(_format_stage(lineage, run, selected))
    source_id = lineage.find_source_id(run)
    if source_id and source_id not in collect_ids(runs):
        node.add(_format_outside_source(lineage, run, source_id))
    for version in lineage.list_models(run):
        aliases = "".join(f"  @{alias}" for alias in version.aliases)
        node.add(Text.assemble((f"models:/{version.name}/{version.version}{aliases}", "cyan")))
    for other in runs:
        if lineage.find_source_id(other) == run.id:
            _add_stage(node, lineage, other, runs, selected)


def _format_outside_source(lineage: Lineage, run: Run, source_id: str) -> Text:
    """Returns a line about an encoder that was trained on another store, or whose run was deleted."""
    source = lineage.runs.get(source_id)
    if source is None:
        return Text(f"from {run.encoder}, whose run does not exist any more", style="yellow")
    return Text(f"from {run.encoder}, of {source.name} ({source.short_id})", style="dim")


def _format_stage(lineage: Lineage, run: Run, selected: Run) -> Text:
    """Returns one line about a stage; it names the stage's recipe if that is not the recipe of `selected`."""
    seconds, recipe = elapsed_seconds(run), lineage.find_recipe(run)
    name = (run.name, "bold reverse" if run.id == selected.id else "bold")
    out = Text.assemble(name, "  ", (run.short_id, "dim"), "  ", _format_state(lineage, run))
    out.append("" if seconds is None else f"  {format_duration(seconds)}")
    scores = format_scores([run])
    out.append(f"  {scores}" if scores else "")
    selected_recipe = selected if selected.is_composite else lineage.find_recipe(selected)
    if recipe and selected_recipe and recipe.name != selected_recipe.name:
        out.append(f"  in {recipe.name}", "magenta")
    return out


def _format_store(lineage: Lineage, digest: str) -> Text:
    prepared = lineage.find_prepare_run(digest)
    if prepared is None:
        return Text(f"a store with sha256 {digest[:12] or 'unknown'}, whose prepare run does not exist")
    name, counts = _store_name(prepared), format_image_counts(prepared.metrics)
    out = Text.assemble((name, "bold"), "  ", (prepared.short_id, "dim"), f"  {counts}", "\n")
    out.append(f"sha256 {digest[:12]}", "dim")
    source = _format_source(prepared)
    out.append(f"  from {source}" if source else "", "dim")
    extends = prepared.params.get("extends")
    out.append(f"  extends {extends}" if extends else "", "dim")
    stored = _has_store(lineage.location.storage / "stores" / name)
    out.append("" if stored else "  not in this storage", "yellow")
    return out


def _has_store(folder: Path) -> bool:
    """Returns True if the storage has a store, here or in its bucket, as far as is known."""
    mirror = find_mirror(folder)
    with contextlib.suppress(OSError):
        return (folder / "manifest.json").exists() or (mirror is not None and mirror.has_unit(folder))
    return False


def _store_name(prepared: Run) -> str:
    return prepared.params.get("store", "").rpartition("/")[2]


def _format_source(prepared: Run) -> str:
    """Returns the name and the root of the source that a prepare run read."""
    return " ".join(filter(None, (prepared.params.get("source"), prepared.params.get("root"))))


def _all_trials_table(lineage: Lineage, search: Run) -> Table:
    rows = (
        (trial.name, trial.short_id, _format_state(lineage, trial), *trial_results(lineage, trial))
        for trial in lineage.list_trials(search)
    )
    return build_table(TRIAL_COLUMNS, rows)


def _inputs_table(lineage: Lineage, run: Run) -> Table:
    """Returns what one stage consumed: its images, or its store, its encoder and its code."""
    out = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    out.add_column(style="bold")
    out.add_column(overflow="fold")
    if run.kind == "prepare":
        out.add_row("consumed", Text.assemble(("images ", "dim"), _format_source(run) or "unknown"))
        return out
    prepared, source, recipe = lineage.find_prepare_run(run.store), lineage.find_source(run), lineage.find_recipe(run)
    name = _store_name(prepared) if prepared else "unknown"
    out.add_row("consumed", Text.assemble(("store ", "dim"), name, (" sha256 ", "dim"), run.store))
    if run.encoder:
        origin = f", made by {source.name} ({source.short_id})" if source else ", whose run does not exist any more"
        out.add_row("", Text.assemble(("encoder ", "dim"), run.encoder, origin))
    code = recipe.params.get("code", "unknown") if recipe else "unknown"
    out.add_row("", Text.assemble(("code sha256 ", "dim"), code))
    return out
