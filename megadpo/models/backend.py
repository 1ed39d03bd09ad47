"""The backend of the layers: Megatron-Core's own modules, or Transformer Engine's where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megadpo.errors import ConfigError
from megadpo.runtime.device import Device
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# The versions whose interfaces this package was written against.
_KNOWN_VERSIONS = ">=2.9,<2.12"
INSTALL = (
    "use NVIDIA's PyTorch image, which brings it (docker/ngc.Dockerfile), or "
    f"pip install --no-build-isolation 'transformer-engine[pytorch]{_KNOWN_VERSIONS}'"
)


def transformer_engine_version() -> Version | None:
    """Version of the Transformer Engine that this process imports; None without one, with a warning if it is broken."""
    if find_spec("transformer_engine") is None:
        return None
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or its libraries are missing
        logger.warning("transformer_engine is installed and can't be imported: %s", error)
        return None
    return Version(transformer_engine.__version__)


def choose_backend(wanted: str, *, device: Device, dtype: torch.dtype) -> str:
    """Chooses a model's layers, 'transformer_engine' or 'native'; `auto` takes the former wherever it can be used.

    Raises ConfigError if transformer_engine is wanted and can't be used.
    """
    if wanted == "native":
        return "native"
    problem = why_not_transformer_engine(device, dtype)
    if problem is None:
        return "transformer_engine"
    if wanted == "transformer_engine":
        raise ConfigError(f"precision.backend=transformer_engine: {problem}; or use precision.backend=auto or native")
    return "native"


def why_not_transformer_engine(device: Device, dtype: torch.dtype) -> str | None:
    """The reason why Transformer Engine can't be used on `device`, with the remedy, as a clause; None if it can."""
    if device.kind != "cuda":
        return "needs a CUDA device: set device.kind=cuda on a machine that has one"
    if dtype not in (torch.bfloat16, torch.float16):
        return "its matrix products round fp32 to TF32, and fp32 is for exact comparisons: set precision.dtype=bf16"
    version = transformer_engine_version()
    if version is None:
        return f"Transformer Engine is not installed, or not for this torch: {INSTALL}"
    if not SpecifierSet(_KNOWN_VERSIONS).contains(version, prereleases=True):
        return f"Transformer Engine {version} is installed, {_KNOWN_VERSIONS} is known: {INSTALL}"
    capability = device.compute_capability()
    if capability < (8, 0):
        shown = ".".join(map(str, capability))
        return f"needs compute capability 8.0 or newer, the device has {shown}: take a newer card"
    return None
