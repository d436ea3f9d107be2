"""`firstlight show`: what a run came from and what came from it, as a tree from the data to the models."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from firstlight.pipeline.cli.history import STYLES, ago, by_stage, long, state, took
from firstlight.pipeline.cli.scores import images, told
from firstlight.pipeline.tracking.lineage import SHOWN, Lineage, Run, ids


def show(lineage: Lineage, run: Run, now: float) -> Group:
    """`now`: seconds since 1970. A recipe: all its stages; a stage: what is above and below it, and what it consumed."""
    parts: list[RenderableType] = [_head(lineage, run, now)]
    if run.kind == "search":
        parts.append(_trials(lineage, run))
    else:
        parts += [_tree(lineage, chosen, run) for chosen in _by_store(related(lineage, run))]
    if not run.whole:
        parts.append(_consumed(lineage, run))
    return Group(*parts)


def related(lineage: Lineage, run: Run) -> list[Run]:
    """The stages that belong into the tree: of a recipe its own, of data all that read them; what those came from, and all that came from them."""
    if run.whole:
        chosen = lineage.stages(run)
    elif run.kind == "prepare":
        chosen = [other for other in lineage.runs.values() if other.store == run.store and not other.whole]
    else:
        chosen = [run]
    found = {one.id: one for one in chosen}
    for one in chosen:
        source = lineage.source(one)
        if source:
            found[source.id] = source
    waiting = list(chosen)
    while waiting:
        for consumer in lineage.consumers(waiting.pop()):
            if consumer.id not in found:
                found[consumer.id] = consumer
                waiting.append(consumer)
    return sorted((one for one in found.values() if one.kind != "prepare"), key=lambda one: one.start)


def _by_store(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.store, []).append(run)
    return list(groups.values())


def _head(lineage: Lineage, run: Run, now: float) -> Text:
    seconds = took(run)
    out = Text.assemble((run.name, "bold"), f"  {run.kind} ", (run.id, "dim"), "\n")
    found = state(lineage, run)
    out.append(found, STYLES.get(found, "yellow"))
    out.append(f", started {ago(now - run.start)}" + ("" if seconds is None else f", took {long(seconds)}"))
    recipe = lineage.recipe(run)
    if recipe:
        out.append(f", of {recipe.name} ({recipe.short})")
    repeats = run.tags.get("firstlight.repeats")
    if repeats:
        out.append(f", repeats {repeats[:SHOWN]}")
    return out


def _tree(lineage: Lineage, runs: Sequence[Run], shown: Run) -> Tree:
    """Of the runs that read one store."""
    tree = Tree(_store(lineage, runs[0].store, runs), guide_style="dim")
    here = ids(runs)
    for run in runs:
        if lineage.source_id(run) not in here:
            _add(tree, lineage, run, runs, shown)
    return tree


def _add(tree: Tree, lineage: Lineage, run: Run, runs: Sequence[Run], shown: Run) -> None:
    node = tree.add(_stage(lineage, run, shown))
    source_id = lineage.source_id(run)
    if source_id and source_id not in ids(runs):
        node.add(_elsewhere(lineage, run, source_id))
    for version in lineage.models(run):
        aliases = "".join(f"  @{alias}" for alias in version.aliases)
        node.add(Text.assemble((f"models:/{version.name}/{version.version}{aliases}", "cyan")))
    for other in runs:
        if lineage.source_id(other) == run.id:
            _add(node, lineage, other, runs, shown)


def _elsewhere(lineage: Lineage, run: Run, source_id: str) -> Text:
    """An encoder that was made on other images, or whose run is gone."""
    source = lineage.runs.get(source_id)
    if source is None:
        return Text(f"from {run.encoder}, whose run is not here any more", style="yellow")
    return Text(f"from {run.encoder}, of {source.name} ({source.short})", style="dim")


def _stage(lineage: Lineage, run: Run, shown: Run) -> Text:
    found, seconds, recipe = state(lineage, run), took(run), lineage.recipe(run)
    out = Text.assemble((run.name, "bold reverse" if run.id == shown.id else "bold"), "  ", (run.short, "dim"), "  ")
    out.append(found, STYLES.get(found, "yellow"))
    out.append("" if seconds is None else f"  {long(seconds)}")
    numbers = told([run])
    out.append(f"  {numbers}" if numbers else "")
    mine = shown if shown.whole else lineage.recipe(shown)
    if recipe and mine and recipe.name != mine.name:
        out.append(f"  in {recipe.name}", "magenta")
    return out


def _store(lineage: Lineage, digest: str, runs: Sequence[Run]) -> Text:
    prepared = lineage.prepared(digest)
    if prepared is None:
        return Text(f"a store with sha256 {digest[:12] or 'unknown'}, whose prepare run is not here")
    path = prepared.params.get("store", "")
    out = Text.assemble(
        (path.rpartition("/")[2], "bold"), "  ", (prepared.short, "dim"), f"  {images(prepared.metrics)}", "\n"
    )
    source = " ".join(filter(None, (prepared.params.get("source"), prepared.params.get("root"))))
    out.append(f"sha256 {digest[:12]}", "dim")
    out.append(f"  from {source}" if source else "", "dim")
    extends = prepared.params.get("extends")
    out.append(f"  extends {extends}" if extends else "", "dim")
    there = (lineage.records.storage / "stores" / path.rpartition("/")[2] / "manifest.json").exists()
    out.append("" if there else "  not in this storage", "yellow")
    return out


def _trials(lineage: Lineage, search: Run) -> Table:
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("trial", "id", "state", "numbers", "encoder"):
        out.add_column(heading, overflow="fold", no_wrap=heading in ("id", "state"))
    for trial in lineage.trials(search):
        stages = [run for run in lineage.stages(trial) if run.kind != "prepare"]
        found, first = state(lineage, trial), next((run for run in stages if run.model), None)
        numbers = "; ".join(filter(None, (told(group) for group in by_stage(stages))))
        out.add_row(
            trial.name,
            trial.short,
            Text(found, STYLES.get(found, "yellow")),
            numbers,
            lineage.reference(first) if first else "",
        )
    return out


def _consumed(lineage: Lineage, run: Run) -> Table:
    """What one stage was given."""
    prepared, source, recipe = lineage.prepared(run.store), lineage.source(run), lineage.recipe(run)
    out = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    out.add_column(style="bold")
    out.add_column(overflow="fold")
    if run.kind == "prepare":
        given = " ".join(filter(None, (run.params.get("source"), run.params.get("root")))) or "unknown"
        out.add_row("consumed", Text.assemble(("images ", "dim"), given))
        return out
    name = prepared.params.get("store", "").rpartition("/")[2] if prepared else "unknown"
    out.add_row("consumed", Text.assemble(("store ", "dim"), name, (" sha256 ", "dim"), run.store))
    if run.encoder:
        by = f", made by {source.name} ({source.short})" if source else ", whose run is not here any more"
        out.add_row("", Text.assemble(("encoder ", "dim"), run.encoder, by))
    out.add_row(
        "", Text.assemble(("code sha256 ", "dim"), recipe.params.get("code", "unknown") if recipe else "unknown")
    )
    return out
