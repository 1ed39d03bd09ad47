"""Ports for the servers of tests that run beside each other."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to whoever connects, as every pair of ranks does.
PORTS = range(10_000, 32_000)


def free_port(ports: range = PORTS) -> int:
    """A port of the range that nobody listens on; a random one, as other test processes ask in the same moment."""
    for port in random.SystemRandom().sample(ports, k=100):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port of {ports} is free")
