"""Pushes an export to the Hugging Face hub, from where timm and Firstlight load it by its name.

The client is that of the library huggingface-hub (the extra `hub`): it finds the token and the address of the hub as
its own commands do.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from firstlight.pipeline.errors import UserError, one_line
from firstlight.pipeline.report.publish.hub_files import HubFile, find_stale_files, list_hub_files
from firstlight.pipeline.stages.export import EXPORT_FOLDER
from firstlight.pipeline.tracking.lineage import Lineage, Run, read_lineage
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.tracking.references import OpenedExperiment, fetch_reference
from firstlight.tasks.nn.weights.weight_sources import HUB_MODEL

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_BRANCH = "main"
BRANCH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# Tokens of the hub, wherever one stands in a message.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]+|(?i:bearer)\s+\S+")
MISSING_EXTRA = "push: needs an extra: pip install 'firstlight[hub]'"
LOGIN_ADVICE = "push: there is no token of the hub; valid: `hf auth login`, or a token that may write in HF_TOKEN"


@dataclass(frozen=True)
class HubTarget:
    """The repository of a hub that an export is pushed to."""

    # owner/name
    repository: str
    # The branch, which is made if it does not exist.
    branch: str = DEFAULT_BRANCH
    # True makes a new repository private, and pushes to no public one.
    is_private: bool = False

    def check_names(self) -> None:
        """Raises UserError if the repository or the branch cannot be one of the hub."""
        name, problem = self.repository, ""
        if not HUB_MODEL.fullmatch(name) or len(name) > 96 or name.endswith((".", "-", ".git")):
            problem = "letters, digits, '-', '_' and '.', at most 96"
        elif "--" in name or ".." in name:
            problem = "no '--' and no '..'"
        if problem:
            raise UserError(f"OWNER/NAME: {name!r} is not valid; valid: <owner>/<name> of {problem}")
        if not BRANCH_NAME.fullmatch(self.branch) or ".." in self.branch or self.branch.endswith(".lock"):
            raise UserError(f"--revision: {self.branch!r} is not valid; valid: the name of a branch")


@contextmanager
def open_export(source: str, location: TrackingLocation) -> Iterator[Path]:
    """Yields the folder of an export: itself, or until the block ends a copy of that of a run in MLflow.

    `source`: a folder, or a run as `firstlight show` takes it.

    Raises:
        UserError: there is none; names RUN_OR_FOLDER or the run.
    """
    if Path(source).is_dir():
        yield Path(source)
        return
    if not source or "/" in source.removeprefix("runs:/").removeprefix("models:/"):
        raise UserError(
            f"RUN_OR_FOLDER: {source!r} is no folder; valid: a run, or the folder `export` of a stage export"
        )
    lineage, _ = read_lineage(location)
    run = find_export(lineage, lineage.find_run(source))
    with TemporaryDirectory(prefix="firstlight-") as target:
        tracking = OpenedExperiment.open(location)
        yield fetch_reference(tracking, f"runs:/{run.id}/{EXPORT_FOLDER}", Path(target), "RUN_OR_FOLDER")


def find_export(lineage: Lineage, run: Run) -> Run:
    """Returns the run itself, or the first seed of the only stage export of a recipe.

    Raises:
        UserError: the run is no export, or the recipe has none or several; or it has not finished.
    """
    stages = lineage.list_stages(run) if run.is_composite else [run]
    exports = [stage for stage in stages if stage.kind == "export"]
    if len({stage.stage for stage in exports}) != 1:
        listing = ", ".join(f"{one.name} ({one.short_id})" for one in exports)
        found = f"{run.name} ({run.short_id}) has {'several exports' if exports else 'no export'}"
        raise UserError(f"run: {found}; valid: {f'the id of one: {listing}' if exports else 'a run of a stage export'}")
    first = min(exports, key=lambda stage: stage.start)
    if first.status != "FINISHED":
        raise UserError(f"run: {first.name} ({first.short_id}) has not finished: it has no export to push")
    return first


def push_folder(folder: Path, target: HubTarget) -> str:
    """Pushes the export in a folder, in one commit. Returns the address of the commit.

    Raises:
        UserError: the folder is no export; a name is not valid; there is no token; the hub refuses it or cannot be
            reached. No message contains the token.
    """
    target.check_names()
    files = list_hub_files(folder)
    api, token = connect_to_hub()
    try:
        return _send_files(api, files, target)
    except UserError:
        raise
    # The hub's client passes on the errors of its own libraries.
    except Exception as error:
        reason = hide_tokens(one_line(error, limit=1000) or type(error).__name__, token)[:300]
        raise UserError(f"OWNER/NAME: {target.repository!r} cannot be pushed to {api.endpoint}: {reason}") from None


def connect_to_hub() -> "tuple[HfApi, str]":
    """Returns the client of the hub, and the token that it uses.

    Raises:
        UserError: the library is not installed, or there is no token.
    """
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise UserError(MISSING_EXTRA) from None
    token = get_token()
    if not token:
        raise UserError(LOGIN_ADVICE)
    if not sys.stderr.isatty():
        disable_progress_bars()
    version = importlib.metadata.version("firstlight")
    return HfApi(token=token, library_name="firstlight", library_version=version), token


def _send_files(api: "HfApi", files: Sequence[HubFile], target: HubTarget) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name, branch = target.repository, target.branch
    api.create_repo(name, private=target.is_private or None, exist_ok=True)
    if target.is_private and not api.repo_info(name).private:
        raise UserError(f"--private: {name!r} exists and is public; nothing was pushed")
    if branch != DEFAULT_BRANCH:
        api.create_branch(name, branch=branch, exist_ok=True)
    stale = find_stale_files(api.list_repo_files(name, revision=branch), list(files))
    changes: list[Any] = [CommitOperationAdd(file.name, str(file.path)) for file in files]
    changes += [CommitOperationDelete(path) for path in stale]
    message = f"Export of Firstlight {importlib.metadata.version('firstlight')}"
    return str(api.create_commit(name, changes, commit_message=message, revision=branch).commit_url)


def hide_tokens(text: str, token: str) -> str:
    """Returns a text without the token, and without anything that looks like one."""
    return TOKEN.sub("***", text.replace(token, "***") if token else text)


def describe_push(files: Sequence[HubFile], target: HubTarget) -> list[str]:
    """Returns lines about what would be pushed: where, which files, and the front matter of README.md."""
    matter = files[0].path.read_text("utf-8").split("\n---\n", 1)[0]
    lines = [f"to {target.repository}, branch {target.branch}{', private' if target.is_private else ''}"]
    lines += [f"{file.size:>13,} bytes  {file.name}" for file in files]
    return [*lines, f"{sum(file.size for file in files):>13,} bytes in {len(files)} files", *matter.split("\n"), "---"]
