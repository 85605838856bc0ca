"""Ports for tests that start servers or several processes."""

import socket


def free():
    """A port of this machine that nothing listens to."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]
