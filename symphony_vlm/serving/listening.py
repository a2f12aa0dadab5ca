"""The address that a page or a server listens on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from symphony_vlm.errors import InputError

__all__ = ["listen"]


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to an address, before the model takes its time to load.

    Raises:
        InputError: the address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise _cannot_listen(host, port, error) from error
        yield listener


def _cannot_listen(host: str, port: int, error: OSError) -> InputError:
    return InputError(
        f"cannot listen there: {error.strerror or error}",
        where=f"{host}:{port}",
        remedy="Choose another --port (0 takes a free one) or --host.",
    )
