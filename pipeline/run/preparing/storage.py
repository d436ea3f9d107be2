"""A check of the folder that a recipe keeps everything in."""

import os
import uuid
from pathlib import Path

from firstlight.pipeline.data.mirror.places import CACHE_VARIABLE, find_mirror
from firstlight.pipeline.errors import UserError


def check_storage(storage: Path) -> None:
    """Checks that a recipe's storage can be written, and, where it is in a bucket, the bucket.

    Raises:
        UserError: names the key, and why it cannot be written.
    """
    mirror = find_mirror(storage)
    if mirror is not None:
        # It needs more than the check of a folder.
        from firstlight.pipeline.run.mirroring import check_bucket

        check_bucket(mirror)
    probe = storage / f".write-{uuid.uuid4().hex[:8]}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        key = "storage" if mirror is None else f"{CACHE_VARIABLE}: of storage {mirror.uri!r} the working folder"
        raise UserError(
            f"{key}: {str(storage)!r} cannot be written: {os.strerror(error.errno or 0)}; "
            "valid: a folder you may write to"
        ) from None
