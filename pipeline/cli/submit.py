"""`firstlight submit`: runs a recipe as a job of a Ray cluster, over the job API of the cluster's dashboard.

Mistakes are found here, before anything is sent. Sent are the resolved recipe and the package `firstlight`, nothing
else: no data, no results, and no files with secrets from the same folder.
"""

import asyncio
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from firstlight.pipeline import ROOT
from firstlight.pipeline.config.conf_files import find_conf_file, find_conf_folder
from firstlight.pipeline.config.load import CONF_GROUPS, STAGE_CONF_GROUPS, load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.yaml_reader import dump_yaml
from firstlight.pipeline.errors import StageFailed, UserError, one_line
from firstlight.pipeline.run.preflight import check_without_images
from firstlight.pipeline.run.ray_session import close_token_file
from firstlight.pipeline.tracking.connection import check_uri
from firstlight.pipeline.tracking.location import SQLITE_URI

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
# Seconds that a new cluster has to accept a job, that a cluster may be unreachable, and between two queries.
SUBMIT_TIMEOUT_S, UNREACHABLE_S, JOB_POLL_S = 60.0, 300.0, 2.0
# Seconds that a stopped job has to write its last checkpoint; Ray's default of 3 is too short.
JOB_STOP_S = 60
VALID_STORAGES = "a folder that all nodes see, such as /shared/firstlight, or s3://bucket/prefix"


@dataclass(frozen=True)
class SubmittedJob:
    """A job by its id on the cluster of `address`."""

    id: str
    address: str

    def instructions(self) -> str:
        """Returns the commands that follow and stop the job, for when it is no longer followed here."""
        ray = "RAY_AUTH_MODE=token ray" if os.environ.get("RAY_AUTH_MODE") == "token" else "ray"
        return (
            f"the job continues: {self.id}\n"
            f"follow it: {ray} job logs --follow --address {self.address} {self.id}\n"
            f"stop it:   {ray} job stop --address {self.address} {self.id}\n"
            "a job that was stopped continues from its last checkpoint when it is sent again"
        )


def resolve_recipe(path: Path, overrides: tuple[str, ...], smoke: bool) -> Recipe:
    """Returns the recipe as the cluster will run it.

    `scale.address: local`, which would start a second Ray on the head, becomes `auto`.

    Raises:
        UserError: the recipe has a mistake that can be found without its data.
    """
    recipe = load_recipe(path, overrides, smoke)
    if recipe.scale.address == "local":
        recipe = load_recipe(path, (*overrides, "scale.address=auto"), smoke)
    check_without_images(recipe)
    return recipe


def check_paths(recipe: Recipe) -> list[str]:
    """Checks what all nodes must reach, and returns warnings.

    A job starts in an empty folder, which is removed with the job.

    Raises:
        UserError: one line for each path that cannot work, with its dotted key.
    """
    mistakes = [*_path_mistakes(recipe), *_tracking_mistakes(recipe.tracking.uri)]
    if mistakes:
        raise UserError("\n".join(mistakes))
    warnings = _tracking_warnings(recipe.tracking.uri)
    if recipe.scale.max_workers == 0:
        warnings.append("scale.workers: 0 trains on the head, in the process of the job")
    return warnings


def _path_mistakes(recipe: Recipe) -> list[str]:
    mistakes = []
    if not recipe.storage.is_absolute():
        problem = f"{str(recipe.storage)!r} would be in the job's own folder, which is removed with it"
        mistakes.append(f"storage: {problem}; valid: {VALID_STORAGES}")
    for key in ("root", "list", "extends"):
        path = getattr(recipe.dataset, key)
        if path is not None and "://" not in path and not os.path.isabs(path):
            problem = f"{path!r} would be in the job's own folder, which has no images"
            mistakes.append(f"dataset.{key}: {problem}; valid: an absolute path, or a URI")
    return mistakes


def _tracking_mistakes(uri: str | None) -> list[str]:
    if uri is None:
        return []
    check_uri(uri)
    found = SQLITE_URI.match(uri)
    if found is None or found["path"].startswith("/"):
        return []
    problem = f"{uri!r} would be in the job's own folder, which is removed with it"
    return [f"tracking.uri: {problem}; valid: http://..., or sqlite:////..."]


def _tracking_warnings(uri: str | None) -> list[str]:
    if uri is None or SQLITE_URI.match(uri):
        database = "null means SQLite in storage, and" if uri is None else "SQLite"
        problem = f"{database} on a network folder can lose its locks"
        return [f"tracking.uri: {problem}; better: a server, tracking.uri=http://host:5000"]
    if urlsplit(uri).hostname in LOOPBACK_HOSTS:
        return [f"tracking.uri: {uri!r} is the head of the cluster, where the job runs, not this machine"]
    return []


def check_address(address: str) -> list[str]:
    """Checks the address of the dashboard, and returns a warning if it is reached without encryption.

    Raises:
        UserError: the address is not valid.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        valid = "the address of a Ray cluster's dashboard, such as http://127.0.0.1:8265"
        raise UserError(f"--address: {address!r} is not valid; valid: {valid}")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
        problem = f"{address!r} is not encrypted: anyone who can read the network traffic can read the token"
        return [f"--address: {problem}; better: a tunnel to 127.0.0.1 of the head"]
    return []


def pack_files(path: Path, recipe: Recipe, folder: Path, code: bool) -> list[str]:
    """Writes the files to send into `folder`, and returns the command that runs the recipe there.

    With `code`, the source of the package is sent too; Python then prefers it to what the cluster has installed,
    because a job starts in this folder.
    """
    conf = find_conf_folder(find_conf_file(path, "recipe"))
    if code:
        # In a checkout, `pipeline`, `tasks` and `conf` are links: copytree follows them and copies the files.
        shutil.copytree(ROOT, folder / ROOT.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for group in (*CONF_GROUPS, *STAGE_CONF_GROUPS):
        (folder / "conf" / group).mkdir(parents=True)
        for file in (conf / group).glob("*.yaml"):
            shutil.copyfile(file, folder / "conf" / group / file.name)
    sent = folder / "conf" / "recipe" / f"{recipe.name}.yaml"
    sent.parent.mkdir()
    sent.write_text(dump_yaml(recipe.dump()), "utf-8")
    assert load_recipe(sent) == recipe, "a resolved recipe resolves to itself"
    return ["python", "-m", "firstlight.pipeline", "run", sent.relative_to(folder).as_posix()]


def connect_to_cluster(address: str) -> "JobSubmissionClient":
    """Returns a client of the cluster's job API, with the token that the environment names.

    Raises:
        UserError: the cluster cannot be reached, or refuses the token.
    """
    close_token_file()
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray prefers this variable to the argument and to RAY_ADDRESS.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        has_token = os.environ.get("RAY_AUTH_MODE") == "token"
        problem = "refuses the token of this machine" if has_token else "requires a token"
        valid = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH of the cluster"
        raise UserError(f"--address: {address} {problem}; valid: {valid}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--address: {address} does not answer as a Ray cluster: {one_line(error)}") from None


def send_job(
    client: "JobSubmissionClient", address: str, path: Path, recipe: Recipe, code: bool, verbose: bool
) -> SubmittedJob:
    """Submits the recipe as a job.

    Raises:
        StageFailed: the cluster does not accept the job.
    """
    job = SubmittedJob(f"{recipe.name}-{uuid.uuid4().hex[:8]}", address)
    environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_S)}
    with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
        command = " ".join([*pack_files(path, recipe, Path(folder), code), *(["-v"] if verbose else [])])
        end = time.monotonic() + SUBMIT_TIMEOUT_S
        while True:
            try:
                client.submit_job(
                    entrypoint=command,
                    submission_id=job.id,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata={"recipe": recipe.name},
                )
                return job
            except (OSError, RuntimeError) as error:
                # Right after its start, a cluster has no agent yet that accepts jobs.
                if "No available agent" not in str(error) or time.monotonic() > end:
                    cause = one_line(error, limit=300)
                    raise StageFailed(f"the cluster does not accept the job: {cause}") from None
            time.sleep(JOB_POLL_S)


def follow_job(client: "JobSubmissionClient", job: SubmittedJob, write: Callable[[str], Any]) -> int:
    """Writes the log of the job until it ends, and returns its exit code.

    A broken connection is opened again, and no text is written twice.

    Raises:
        StageFailed: the cluster was unreachable for `UNREACHABLE_S`.
    """
    num_written, last_answer = 0, time.monotonic()
    while True:
        try:
            num_written = asyncio.run(_stream_logs(client, job.id, num_written, write))
            info = client.get_job_info(job.id)
            last_answer = time.monotonic()
            if info.status.is_terminal():
                return _read_exit_code(info, write)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() - last_answer > UNREACHABLE_S:
                problem = f"the cluster has not answered for {UNREACHABLE_S:.0f} s ({one_line(error)})"
                raise StageFailed(f"{problem}; {job.instructions()}") from None
        time.sleep(JOB_POLL_S)


async def _stream_logs(
    client: "JobSubmissionClient", job_id: str, num_written: int, write: Callable[[str], Any]
) -> int:
    """Writes the log from character `num_written` on, and returns how many characters are written by now.

    Ray sends the whole log on every connection. A broken connection ends the stream without an error.
    """
    num_received = 0
    try:
        async for text in client.tail_job_logs(job_id):
            num_received += len(text)
            if num_received > num_written:
                write(text[num_written - num_received :])
                num_written = num_received
    except (OSError, RuntimeError, aiohttp.ClientError):
        # The next query finds out whether the job continues.
        pass
    return num_written


def _read_exit_code(info: Any, write: Callable[[str], Any]) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        write("the job was stopped; sent again it continues from its last checkpoint\n")
        return 143
    # A job without an exit code never started.
    if info.driver_exit_code is None:
        write(f"error: the job failed: {one_line(info.message or 'Ray gives no reason', limit=500)}\n")
        return 1
    return int(info.driver_exit_code)
