"""One manager for one LMCache server: a second one would let the first one's KV cache expire."""

import errno
import hashlib
import os
import socket
import struct
import weakref

from kvttl.lmcache.client import LMCacheError

_held: weakref.WeakValueDictionary[str, "ServerLease"] = weakref.WeakValueDictionary()


class AlreadyManaged(LMCacheError):
    """Another manager has this LMCache server."""


class ServerLease:
    """The right to manage one LMCache server's KV cache, until `release` or the process ends.

    It is a name among Linux's abstract sockets: the kernel takes it back with the process,
    however that ends, and it reaches as far as a loopback port does (one network
    namespace). Managers on other machines do not see it.

    Parameters
    ----------
    server : str
        What is managed, such as ``"lmcache_default_instance at 127.0.0.1:9000"``. A later
        lease of the same process takes it over, so that a notebook's cell can run twice.

    Raises
    ------
    AlreadyManaged
        Another process has it; from `check`: a later manager of this process took it over.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        earlier = _held.get(server)
        self._socket = _bind(server) if earlier is None else earlier._hand_over()
        _held[server] = self

    def check(self) -> None:
        """Raise AlreadyManaged if this lease was taken over."""
        if self._socket is None:
            taken_over = f"has taken over LMCache server {self._server}"
            raise AlreadyManaged(f"a later manager of this process {taken_over}")

    def release(self) -> None:
        """Let another manager have the server."""
        if self._socket is not None and _held.get(self._server) is self:
            del _held[self._server]
            self._socket.close()

    def _hand_over(self):
        mine, self._socket = self._socket, None
        return mine


def _bind(server):
    name = "\0kvttl-manager-" + hashlib.sha256(server.encode()).hexdigest()
    lease = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lease.bind(name)
    except OSError as error:
        lease.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise AlreadyManaged(
            f"LMCache server {server} has a manager already, process {_holder(name)}: a second "
            "one would let the first one's KV cache expire; close() that one or end its process"
        ) from None
    lease.listen()
    return lease


def _holder(name):
    """Return the process that has bound a name, as text."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.connect(name)
            peer = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return str(struct.unpack("3i", peer)[0])
    except OSError:  # it has just ended
        return "unknown"


def _forget_after_fork():
    """A child has the parent's sockets, and would hold its leases beyond its end."""
    for lease in list(_held.values()):
        lease._hand_over().close()
    _held.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
