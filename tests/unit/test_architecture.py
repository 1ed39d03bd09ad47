"""The house stands: imports point down only, third-party packages stay in their rooms, torch.cuda in one file.

Unit tests lie in the rooms of what they test. The checks read syntax trees and names of files, and run nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up; a room imports rooms of lower floors only.
FLOORS = [
    ["errors"],
    ["runtime", "loss"],
    ["optimizer", "metrics"],
    ["models"],
    ["data", "health"],
    ["forward_step"],
    ["checkpoint", "reference"],
    ["planner", "train"],
    ["config"],
    ["setup"],
    ["commands"],
    ["tools"],
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# What data/ may know of models/: the description of a packed stream, which it makes.
SHARED_WITH_DATA = "megadpo.models.attention_plan"

# Package -> modules that may import it, with everything under them.
HOMES = {
    "hydra": ["megadpo.config.compose", "tools"],
    "omegaconf": ["megadpo.config.compose", "tools"],
    "transformers": ["megadpo.data.tokenization", "megadpo.models.hf_config", "megadpo.commands.verify", "tools"],
    "datasets": ["megadpo.data.sources", "tools.bench"],
    "psutil": ["megadpo.setup.launch"],
    "pyarrow": ["megadpo.data.sources"],
    "matplotlib": ["tools.inspection", "tools.bench"],
    "mkdocs": ["tools.docs"],
    "wandb": ["megadpo.metrics.trackers"],
    "tensorboard": ["megadpo.metrics.trackers"],
    "torch.utils.tensorboard": ["megadpo.metrics.trackers"],
    "torch.cuda": ["megadpo.runtime.device"],
    "megatron": [
        "megadpo.runtime",
        "megadpo.optimizer",
        "megadpo.models",
        "megadpo.forward_step",
        "megadpo.checkpoint",
        "megadpo.train",
        "megadpo.planner",
        "tools.bench",
    ],
}
# Modules whose only third-party import is torch.
PURE = [
    "megadpo.data.schedule",
    "megadpo.health.hints",
    "megadpo.health.history",
    "megadpo.health.rules",
    "megadpo.loss",
    "megadpo.metrics.flops",
    "megadpo.metrics.reduction",
    "megadpo.models.attention_plan",
    "megadpo.models.conversion.mapping",
    "megadpo.models.conversion.stored",
]
# Unit tests of the project as a whole, in no room.
OF_THE_PROJECT = {"architecture", "compare_commits", "docs", "own_clone", "voice"}


def sources() -> dict[str, str]:
    """Text of every module of megadpo and tools by dotted name; a package has its own name."""
    found = {}
    for path in sorted([*(ROOT / "megadpo").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def used_names(text: str) -> set[str]:
    """Dotted names that a module imports, `from` imports with what they take, and `torch.X` wherever it is named."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            names.add(f"torch.{node.attr}")
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room(module: str) -> str:
    """`megadpo.data.batch` -> data, `tools.train` -> tools, `megadpo` -> megadpo."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megadpo" and len(parts) > 1 else parts[0]


def upward_imports(modules: dict[str, str]) -> Iterator[str]:
    for module, text in modules.items():
        here = room(module)
        for name in sorted(used_names(text)):
            there = room(name)
            if name.split(".")[0] not in ("megadpo", "tools") or "megadpo" in (here, there) or there == "__version__":
                continue
            foreign = (here, there) == ("data", "models") and not within(name, SHARED_WITH_DATA)
            if FLOOR[there] > FLOOR[here] or (FLOOR[there] == FLOOR[here] and there != here) or foreign:
                yield f"{module} imports {name}"


def strays(modules: dict[str, str]) -> Iterator[str]:
    for module, text in modules.items():
        for name in sorted(used_names(text)):
            for package, homes in HOMES.items():
                if within(name, package) and not any(within(module, home) for home in homes):
                    yield f"{module} uses {name}"


def impurities(modules: dict[str, str]) -> Iterator[str]:
    allowed = {*sys.stdlib_module_names, "torch", "megadpo"}
    for module, text in modules.items():
        if any(within(module, pure) for pure in PURE):
            for name in sorted(used_names(text)):
                if name.split(".")[0] not in allowed:
                    yield f"{module} imports {name}"


def cycle(modules: dict[str, str]) -> list[str]:
    """Modules of one import cycle, [] when there is none."""
    graph = {
        module: {known for name in used_names(text) for known in (name, name.rpartition(".")[0]) if known in modules}
        - {module}
        for module, text in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def misplaced_tests(root: Path) -> Iterator[str]:
    """Test files of the rooms' unit tests that no module of megadpo at the same place has given its name."""
    unit = root / "tests" / "unit"
    for path in sorted(unit.rglob("test_*.py")):
        room = path.relative_to(unit).parent
        name = path.stem.removeprefix("test_")
        modules = [module.stem for module in (root / "megadpo" / room).glob("*.py")]
        mirrors = any(name == module or name.startswith(f"{module}_") for module in modules)
        if room != Path("tools") and not mirrors and not (room == Path() and name in OF_THE_PROJECT):
            yield str(path.relative_to(root))


# The house as it is


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in sources()} - {"megadpo"} <= set(FLOOR)


def test_imports_point_down() -> None:
    assert list(upward_imports(sources())) == []


def test_no_import_cycles() -> None:
    assert cycle(sources()) == []


def test_packages_stay_in_their_rooms() -> None:
    assert list(strays(sources())) == []


def test_pure_modules_import_torch_only() -> None:
    assert all(any(within(module, pure) for module in sources()) for pure in PURE)
    assert list(impurities(sources())) == []


def test_unit_tests_lie_where_their_module_lies() -> None:
    """megadpo/loss/logprobs.py is tested in tests/unit/loss/test_logprobs.py, and may be in test_logprobs_memory.py."""
    assert list(misplaced_tests(ROOT)) == []


# The checks themselves


@pytest.mark.parametrize(
    ("module", "text", "offence"),
    [
        ("megadpo.runtime.device", "from megadpo.data.batch import join", "megadpo.data.batch.join"),
        ("megadpo.data.batch", "import megadpo.models.policy", "megadpo.models.policy"),
        ("megadpo.models.policy", "import megadpo.data.batch", "megadpo.data.batch"),
        ("megadpo.config.schema", "from tools.train import main", "tools.train.main"),
        ("megadpo.loss.preference", "def f():\n    from megadpo import forward_step", "megadpo.forward_step"),
    ],
)
def test_an_upward_import_is_found(module: str, text: str, offence: str) -> None:
    assert list(upward_imports({module: text})) == [f"{module} imports {offence}"]


@pytest.mark.parametrize(
    ("module", "text", "offence"),
    [
        ("megadpo.loss.preference", "import torch\nx = torch.cuda.is_available()", "torch.cuda"),
        ("megadpo.loss.preference", "from torch import cuda", "torch.cuda"),
        ("megadpo.data.loader", "import megatron.core", "megatron.core"),
        ("megadpo.data.dataset", "from transformers import AutoTokenizer", "transformers.AutoTokenizer"),
        ("megadpo.config.schema", "import omegaconf", "omegaconf"),
        (
            "megadpo.metrics.reduction",
            "from torch.utils.tensorboard import SummaryWriter",
            "torch.utils.tensorboard.SummaryWriter",
        ),
        ("tools.train", "import torch\ntorch.cuda.empty_cache()", "torch.cuda"),
    ],
)
def test_a_package_outside_its_room_is_found(module: str, text: str, offence: str) -> None:
    assert list(strays({module: text})) == [f"{module} uses {offence}"]


def test_an_impurity_is_found() -> None:
    assert list(impurities({"megadpo.loss.preference": "import math\nimport rich"})) == [
        "megadpo.loss.preference imports rich"
    ]


def test_a_cycle_is_found() -> None:
    modules = {
        "megadpo.loss.preference": "from megadpo.metrics.reduction import x",
        "megadpo.metrics.reduction": "import megadpo.loss.preference",
    }
    assert set(cycle(modules)) == set(modules)


def test_a_misplaced_test_is_found(tmp_path: Path) -> None:
    for file in ("megadpo/loss/logprobs.py", "tests/unit/loss/test_logprobs.py", "tests/unit/data/test_logprobs.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert list(misplaced_tests(tmp_path)) == ["tests/unit/data/test_logprobs.py"]


def test_downward_imports_pass() -> None:
    modules = {
        "tools.train": "import torch, hydra\nfrom megadpo import __version__\nfrom megadpo.train.trainer import Trainer"
    }
    assert not [*upward_imports(modules), *strays(modules)]
