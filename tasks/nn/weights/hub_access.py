"""The Hugging Face hub without a network: its client would try again for minutes before it says so."""

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def find_unknown_host(address: str) -> str | None:
    """Returns the host of an address if its name cannot be resolved here; None if it can, or if a proxy does that."""
    host = urlsplit(address).hostname
    if not host or getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return host
    return None


def find_cached_file(repository: str, names: tuple[str, ...], revision: str | None) -> Path | None:
    """Returns the first of `names` that the hub's cache on this machine has of a repository, None if it has none."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    # Files that a repository is known not to have are another object.
    return next((Path(file) for file in found if isinstance(file, str)), None)
