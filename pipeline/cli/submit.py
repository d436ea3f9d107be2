"""`firstlight submit`: a recipe as a job of a Ray cluster, over the job API of its dashboard. Mistakes are found here, before anything is sent.

What is sent is the recipe as it resolves and the source of `pipeline` and `tasks`, nothing else: no data, no results, no file of secrets that lies
beside them.
"""

import asyncio
import logging
import os
import re
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
from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.recipe import GROUPS, STAGE_GROUPS, Recipe, conf_root, load
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.run.preflight import check_alone
from firstlight.pipeline.run.ray_session import close_token_file
from firstlight.pipeline.tracking.client import check_uri

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_S, AWAY_S, POLL_S = (
    60.0,
    300.0,
    2.0,
)  # that a cluster has to take a job, may be out of reach, and between questions
STOP_S = 60  # that a job has to write its last checkpoint when it is stopped; Ray's 3 s are too few
SHARED = "a folder that all nodes see, such as /shared/firstlight"


@dataclass(frozen=True)
class Job:
    """A job that was sent, by its id on the cluster of `address`."""

    id: str
    address: str

    def ways(self) -> str:
        """How to see it and to stop it, once it is no longer followed."""
        ray = "RAY_AUTH_MODE=token ray" if os.environ.get("RAY_AUTH_MODE") == "token" else "ray"
        return (
            f"the job goes on: {self.id}\n"
            f"see it:   {ray} job logs --follow --address {self.address} {self.id}\n"
            f"stop it:  {ray} job stop --address {self.address} {self.id}\n"
            "sent again, a job that was stopped goes on from its last checkpoint"
        )


def resolve(path: Path, overrides: tuple[str, ...], smoke: bool) -> Recipe:
    """The recipe as the cluster will run it: `scale.address: local`, which would start a second Ray on the head, is `auto`.

    Raises:
        UserError: a mistake in it, as far as it can be known from here.
    """
    recipe = load(path, overrides, smoke)
    if recipe.scale.address == "local":
        recipe = load(path, (*overrides, "scale.address=auto"), smoke)
    check_alone(recipe)
    return recipe


def check_places(recipe: Recipe) -> list[str]:
    """What must be reachable from all nodes. A job starts in a folder of its own that is removed with it; the answer is what may go wrong.

    Raises:
        UserError: a line for each place that cannot work, with its dotted key.
    """
    wrong, doubtful = [], []
    if not recipe.storage.is_absolute():
        wrong.append(
            f"storage: {str(recipe.storage)!r} would be in the job's own folder, which is removed with it; valid: {SHARED}"
        )
    for key in ("root", "list", "extends"):
        place = getattr(recipe.dataset, key)
        if place is not None and "://" not in place and not os.path.isabs(place):
            wrong.append(
                f"dataset.{key}: {place!r} would be in the job's own folder, which has no images; valid: an absolute path, or a URI"
            )
    uri = recipe.tracking.uri
    if uri is not None:
        check_uri(uri)
    if uri is not None and re.match(r"sqlite:///[^/]", uri):
        wrong.append(
            f"tracking.uri: {uri!r} would be in the job's own folder, which is removed with it; valid: http://..., or sqlite:////..."
        )
    elif uri is None or uri.startswith("sqlite:"):
        where = "null means SQLite in storage, and" if uri is None else "SQLite"
        doubtful.append(
            f"tracking.uri: {where} on a network folder can lose its locks; better is a server: tracking.uri=http://host:5000"
        )
    elif urlsplit(uri).hostname in LOOPBACK:
        doubtful.append(f"tracking.uri: {uri!r} is the head of the cluster, where the job runs, not this machine")
    if recipe.scale.most == 0:
        doubtful.append("scale.workers: 0 trains on the head, in the job's own process")
    if wrong:
        raise UserError("\n".join(wrong))
    return doubtful


def check_address(address: str) -> list[str]:
    """What may go wrong with it.

    Raises:
        UserError: it is none.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--address: {address!r} is not valid; valid: that of the dashboard of a Ray cluster, such as http://127.0.0.1:8265"
        )
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        return [
            f"--address: {address!r} is not encrypted: whoever can listen on the way reads the token; better is a tunnel to the head's 127.0.0.1"
        ]
    return []


def pack(path: Path, recipe: Recipe, folder: Path, code: bool) -> list[str]:
    """Put what is sent into a folder; the words of the command that runs it there.

    `code`: with the source of `pipeline` and `tasks`, which then goes before what the cluster has installed.
    """
    conf = conf_root(path)
    if code:
        shutil.copytree(ROOT, folder / ROOT.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for group in (*GROUPS, *STAGE_GROUPS):
        (folder / "conf" / group).mkdir(parents=True)
        for file in (conf / group).glob("*.yaml"):
            shutil.copyfile(file, folder / "conf" / group / file.name)
    sent = folder / "conf" / "recipe" / f"{recipe.name}.yaml"
    sent.parent.mkdir()
    sent.write_text(yaml_reader.dump(recipe.dump()), "utf-8")
    assert load(sent) == recipe, "a recipe that is resolved resolves to itself"
    return ["python", "-m", "firstlight.pipeline", "run", sent.relative_to(folder).as_posix()]


def connect(address: str) -> "JobSubmissionClient":
    """The job API of a cluster, with the token that the environment names.

    Raises:
        UserError: it cannot be reached, or does not know the token.
    """
    close_token_file()
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray takes before the argument, and before RAY_ADDRESS
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        given = (
            "refuses the token that this machine has" if os.environ.get("RAY_AUTH_MODE") == "token" else "wants a token"
        )
        raise UserError(
            f"--address: {address} {given}; valid: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH of the cluster"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--address: {address} is no Ray cluster that answers: {str(error).splitlines()[0][:200]}"
        ) from None


def send(client: "JobSubmissionClient", address: str, path: Path, recipe: Recipe, code: bool, verbose: bool) -> Job:
    """Hand the recipe in as a job.

    Raises:
        StageFailed: the cluster does not take it.
    """
    job = Job(f"{recipe.name}-{uuid.uuid4().hex[:8]}", address)
    with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
        words = pack(path, recipe, Path(folder), code)
        environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
        command, sent = (
            " ".join([*words, *(["-v"] if verbose else [])]),
            {"working_dir": folder, "env_vars": environment},
        )
        end = time.monotonic() + START_S
        while True:
            try:
                client.submit_job(
                    entrypoint=command, submission_id=job.id, runtime_env=sent, metadata={"recipe": recipe.name}
                )
                return job
            except (
                OSError,
                RuntimeError,
            ) as error:  # right after the start of a cluster there is no agent yet that takes jobs
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise StageFailed(
                        f"the cluster does not take the job: {' '.join(str(error).split())[-300:]}"
                    ) from None
            time.sleep(POLL_S)


def follow(client: "JobSubmissionClient", job: Job, write: Callable[[str], Any]) -> int:
    """Pass on what the job says until it has ended; its exit code. A connection that breaks is made anew, and nothing is said twice.

    Raises:
        StageFailed: the cluster was out of reach for `AWAY_S`.
    """
    said, last = 0, time.monotonic()
    while True:
        try:
            said = asyncio.run(_tail(client, job.id, said, write))
            info = client.get_job_info(job.id)
            last = time.monotonic()
            if info.status.is_terminal():
                return _ended(info, write)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() - last > AWAY_S:
                raise StageFailed(
                    f"the cluster has not answered for {AWAY_S:.0f} s ({str(error)[:200]}); {job.ways()}"
                ) from None
        time.sleep(POLL_S)


async def _tail(client: "JobSubmissionClient", job: str, said: int, write: Callable[[str], Any]) -> int:
    """Ray begins with the first line each time: the first `said` characters are passed over. How many were said then, however it ended."""
    heard = 0
    try:
        async for text in client.tail_job_logs(job):
            heard += len(text)
            if heard > said:
                write(text[said - heard :])
                said = heard
    except (OSError, RuntimeError, aiohttp.ClientError):
        pass  # whether the job goes on is asked for next
    return said


def _ended(info: Any, write: Callable[[str], Any]) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        write("the job was stopped; sent again it goes on from its last checkpoint\n")
        return 143
    if info.driver_exit_code is None:  # it never ran
        write(f"error: the job failed: {' '.join((info.message or 'Ray does not say why').split())[:500]}\n")
        return 1
    return int(info.driver_exit_code)
