"""Identity of the program that a rank runs: versions, and a hash of the package's files."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import megadpo
from megadpo import __version__

# Packages that numbers, and the order of the pairs, depend on.
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "transformers", "tokenizers")


def package_versions() -> dict[str, str]:
    """Versions of megadpo, Python and the installed packages that compute, by name."""
    versions = {"megadpo": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def described_program(root: Path = Path(megadpo.__file__).parent) -> str:
    """All versions, and the sha256 of all modules below `root`, megadpo's own, as one line."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    versions = [f"{package} {version}" for package, version in package_versions().items()]
    return f"{', '.join(versions)}, files {digest.hexdigest()[:16]}"
