"""The structure of the package: which way imports run, and that every option is read and documented."""

import ast
import inspect
import sys
import textwrap
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import quiet_trainer

import lightning_dqn
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar

PACKAGE = Path(lightning_dqn.__file__).parent
# which parts of the package each part may import
ALLOWED = {
    "__main__": {"cli"},
    "__init__": {"agent", "callbacks", "datamodule", "module", "networks", "replay", "sampling", "variants"},
    # other libraries' private parts, and what callbacks get from the trainer
    "_compat": set(),
    "run": set(),
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
    "callbacks": {"losses", "resume", "run"},
    # families
    "acting": {"networks"},
    "evaluation": {"collector", "distributed", "envs"},
    "envs": {"resume"},
    "networks": {"resume"},
    "sampling": {"replay", "storage"},
    "storage": set(),
    "validation": {"distributed", "replay", "storage"},
    "variants": {
        *("collector", "distributed", "envs", "losses", "module", "networks", "replay", "resume", "speed"),
        "validation",
    },
    # machinery
    "distributed": {"run"},
    "resume": {"distributed", "run"},
    "speed": {"distributed", "losses"},
    # users
    "agent": {"acting", "envs", "module", "resume"},
    "cli": {
        *("callbacks", "datamodule", "distributed", "envs", "module", "monitoring", "networks", "resume", "run"),
        *("sampling", "validation", "variants"),
    },
    "monitoring": {"callbacks", "datamodule", "envs", "losses", "resume", "run"},
}
CORE = ("module", "losses", "collector", "data", "datamodule", "replay", "callbacks")


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


def test_imports_have_no_cycle():
    sorter = TopologicalSorter({part: parts - {part} for part, parts in ALLOWED.items() if part != "__init__"})
    assert len(list(sorter.static_order())) == len(ALLOWED) - 1
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = [node.module.removeprefix("lightning_dqn.") for node in imports if node.module]
        names = [f"{node.module}.{each.name}".removeprefix("lightning_dqn.") for node in imports for each in node.names]
        graph[name] = {other for other in (*modules, *names) if other in files} - {name}
    TopologicalSorter(graph).prepare()


def lines_of(path):
    return len(path.read_text().splitlines())


def test_files_and_functions_stay_short():
    assert {path.name: lines_of(path) for path in PACKAGE.rglob("*.py") if lines_of(path) > 490} == {}
    assert sum(lines_of(PACKAGE / f"{name}.py") for name in CORE) <= 2_550
    assert sum(map(lines_of, PACKAGE.rglob("*.py"))) <= 12_850
    assert sum(map(lines_of, Path(__file__).parent.glob("*.py"))) <= 17_200
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                described = len((ast.get_docstring(node, clean=False) or "").splitlines())
                assert node.end_lineno - node.lineno + 1 - described <= 50, f"{path}: {node.name}"


def test_one_update_and_the_path_of_its_data_run_through_few_files():
    """The files whose functions run in 30 iterations, each an env step, a draw and a plain update, are printed."""

    class Plain(lightning_dqn.DQN):
        def update(self, batch):
            return super().update(batch)

    run = Counter()

    class Trace(UpdateCallback):
        iterations = 0

        def on_iteration_end(self, trainer, pl_module, batch, results):
            self.iterations += 1
            if self.iterations == 200:
                sys.setprofile(record)
            if self.iterations == 230:
                sys.setprofile(None)

    def record(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            run[str(path.relative_to(PACKAGE))] += 1

    data = lightning_dqn.DQNDataModule(epoch_env_steps=256, eval_episodes=1)
    module = Plain(data.observation_space, data.action_space, compile=False)
    before = sys.getprofile()
    quiet_trainer(callbacks=[Trace()]).fit(module, data)
    sys.setprofile(before)
    assert module.update_mode == "plain"
    # the environment is Gymnasium's, seen through its VectorEnv
    files = sorted(name for name in run if not name.startswith("envs/"))
    lines = {name: lines_of(PACKAGE / name) for name in files}
    print(*(f"{name} {count}" for name, count in lines.items()), sep="\n")  # noqa: T201
    assert not [name for name in files if name.startswith(("resume", "distributed", "monitoring", "cli"))]
    assert len(files) <= 14
    assert sum(lines.values()) <= 3_250


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
