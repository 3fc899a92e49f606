"""The structure of the package: which way imports run, and that every option is read and documented."""

import ast
import inspect
import textwrap
from collections import Counter
from pathlib import Path

import pytest

import lightning_dqn
from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar

PACKAGE = Path(lightning_dqn.__file__).parent
# which parts of the package each part may import
ALLOWED = {
    "__main__": {"cli"},
    "__init__": {"agent", "callbacks", "datamodule", "module", "networks", "replay", "sampling", "variants"},
    # other libraries' private parts; every part may import it
    "_compat": set(),
    # core
    "losses": set(),
    "replay": {"distributed", "resume", "storage"},
    "collector": {"envs", "resume"},
    "data": {"collector", "distributed", "replay", "resume"},
    "datamodule": {
        *("collector", "data", "distributed", "envs", "evaluation", "replay", "resume", "validation"),
    },
    "module": {
        *("acting", "callbacks", "distributed", "evaluation", "losses", "networks", "replay", "resume", "speed"),
        "validation",
    },
    "callbacks": {"losses", "resume"},
    # families
    "acting": {"networks"},
    "evaluation": {"collector", "distributed", "envs"},
    "envs": {"resume"},
    "networks": {"resume"},
    "sampling": {"replay", "storage"},
    "storage": set(),
    "variants": {
        *("collector", "distributed", "envs", "losses", "module", "networks", "replay", "resume", "speed"),
        "validation",
    },
    # machinery
    "distributed": {"callbacks", "resume"},
    "resume": {"callbacks", "distributed"},
    "speed": {"distributed", "losses"},
    # users
    "agent": {"acting", "envs", "module", "resume"},
    "cli": {
        *("callbacks", "datamodule", "distributed", "envs", "module", "monitoring", "networks", "resume", "sampling"),
        *("validation", "variants"),
    },
    "monitoring": {"callbacks", "datamodule", "envs", "losses", "resume"},
    "validation": {"distributed", "replay", "storage"},
}


def part_of(path):
    """The name of the module or sub-package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """Parts of the package that a file imports when it runs, those under `if TYPE_CHECKING:` left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_only:
            assert node.level == 0, f"{path}: relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "lightning_dqn":
                yield parts[1] if len(parts) > 1 else "__init__"
        if isinstance(node, ast.Import) and node not in typing_only:
            assert not any(alias.name.startswith("lightning_dqn") for alias in node.names), path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert set(imported_parts(path)) <= ALLOWED[part_of(path)] | {part_of(path), "_compat"}


def names_read():
    """How often each name or attribute is read in the package, but for where a constructor keeps its argument."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                yield node.id if isinstance(node, ast.Name) else node.attr


def kept_as(owner, option):
    """The attributes that a constructor keeps an argument in."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner.__init__)))
    for node in ast.walk(tree):
        assigns = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
        if assigns and option in {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}:
            yield node.targets[0].attr


CLASSES = (
    "DQN C51 QRDQN IQN PQN MLP NatureCNN MinAtarCNN ImpalaCNN DQNDataModule EpsilonDecay PrioritizedSampler "
    "PriorityUpdate SoftTargetUpdate UniformSampler"
)
MONITORING = [AgentVideo, EpisodePlot, EpisodeStatistics, RunProgressBar]


@pytest.mark.parametrize("owner", [getattr(lightning_dqn, name) for name in CLASSES.split()] + MONITORING)
def test_every_option_is_read_and_explained(owner):
    read = Counter(names_read())
    for option in inspect.signature(owner).parameters:
        attributes = list(kept_as(owner, option))
        # an option that is not kept is used where it comes in; a kept one is read somewhere
        used = any(read[attribute] > 0 for attribute in attributes) if attributes else read[option] > 0
        assert used, f"{owner.__name__}.{option} is never read"
        explained = any(f"{option}: " in (base.__doc__ or "") for base in owner.__mro__)
        assert explained, f"{owner.__name__}.{option} is not explained"


def test_every_public_definition_has_a_docstring():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} does not say what it is"
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        public = [tree, *classes]
        for node in [inner for outer in public for inner in getattr(outer, "body", [])]:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                # the lines of a protocol say what they want by their types
                protocol = isinstance(node.body[0], ast.Expr) and getattr(node.body[0].value, "value", None) is ...
                assert protocol or ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"
