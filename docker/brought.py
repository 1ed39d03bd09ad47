#!/usr/bin/env python3
"""Makes constraints for pip from the packages of an image: its compiled stack stays, others may only be upgraded.

An image such as NVIDIA's contains torch, Transformer Engine, apex and more, built against one another: none of them may
change. Its other packages stay unless a requirement asks for a newer version. `constraints.txt` of the project decides
the versions of packages that the image lacks. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

# Packages compiled against torch and CUDA, and the ones they depend on. A local version (1.2+abc) shows the same:
# it was built for this image, and no index has it.
_STACK = re.compile(
    r"^(numpy|triton|apex|nvfuser|(torch|functorch|pytorch|transformer-engine|flash-attn|nvidia|cuda)(-.*|[a-z]*))$"
)


def normalise(name: str) -> str:
    """The name of a package as indexes spell it: lower case, single hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """The version of every package of this environment by its name."""
    # The first on the path is the one that is imported.
    found: dict[str, str] = {}
    for distribution in distributions():
        if distribution.metadata["Name"]:  # a leftover of a broken removal has none
            found.setdefault(normalise(distribution.metadata["Name"]), distribution.version)
    return found


def in_stack(name: str, version: str) -> bool:
    """Returns whether a package must stay unchanged."""
    return "+" in version or _STACK.match(name) is not None


def constraints(pins: Iterable[str], brought: Mapping[str, str]) -> list[str]:
    """Returns lines for pip: packages of the image at their version (the stack) or above, and pins of all others."""
    kept = [f"{name}{'==' if in_stack(name, version) else '>='}{version}" for name, version in sorted(brought.items())]
    rest = [
        pin for pin in pins if not pin.startswith("#") and pin.strip() and normalise(pin.split("==")[0]) not in brought
    ]
    return kept + rest


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Returns (changes of the stack, upgrades of other packages of the image), each as a readable line."""
    changes = {
        name: f"{name} {version} -> {after.get(name, 'removed')}"
        for name, version in sorted(before.items())
        if after.get(name) != version
    }
    broken = [line for name, line in changes.items() if in_stack(name, before[name])]
    return broken, [line for line in changes.values() if line not in broken]


def main() -> int:
    """Makes the inventory and constraints (`write`) or compares (`verify`); returns 1 if the stack has changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["write", "verify"])
    parser.add_argument("--pins", type=Path, help="the project's constraints (write)")
    parser.add_argument("--out", type=Path, required=True, help="directory of constraints.txt and brought.json")
    arguments = parser.parse_args()
    inventory = arguments.out / "brought.json"
    now = installed()
    if arguments.action == "write":
        inventory.write_text(json.dumps(now))
        lines = constraints(arguments.pins.read_text().splitlines(), now)
        (arguments.out / "constraints.txt").write_text("\n".join(lines) + "\n")
        stack = [f"{name} {version}" for name, version in sorted(now.items()) if in_stack(name, version)]
        print(f"{len(now)} packages are brought; these stay as they are: {', '.join(stack) or 'none'}")
        return 0
    broken, renewed = compare(json.loads(inventory.read_text()), now)
    print(f"renewed: {', '.join(renewed) or 'none'}")
    if broken:
        print(f"the installation changed what the image's packages are built on: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
