"""The floors of the house, held by reading the source: who may import whom, and when."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# From the bottom up; a unit imports only from rows below its own. data has rooms, which are units of their own.
FLOORS = [
    ["errors", "log"],
    ["files", "processes"],
    ["config"],
    ["data.order", "distributed"],
    ["tasks"],
    ["data.read", "models", "optim"],
    ["data.prepare", "engine", "plan"],
    ["checkpoint", "data", "supervise", "telemetry"],
    ["run"],
    ["testing"],
    ["cli"],
    ["__main__"],
]
FLOOR_OF = {unit: number for number, row in enumerate(FLOORS) for unit in row}

# Slow, large or optional: imported by the function that needs them, or at the top of a module which
# itself is imported that way.
LAZY = [
    *("accelerate", "datasets", "deepspeed", "fsspec", "matplotlib", "optuna", "pyarrow", "rensa", "s3fs", "tiktoken"),
    *("PIL", "tensorboardX", "tokenizers", "transformers", "wandb", "wandb_workspaces"),
]
WITHOUT_TORCH = [
    "bigtrain.errors",
    "bigtrain.config.convert",
    "bigtrain.config",
    "bigtrain.config.check",
    "bigtrain.log",
]
WITHOUT_TORCH_OF_THEIR_OWN = ["bigtrain.plan", "bigtrain.models.sizes"]
ONLY_IN = {
    "hydra": "bigtrain.cli.",
    "omegaconf": "bigtrain.cli.",
    "wandb": "bigtrain.telemetry.wandb_logger",
    "wandb_workspaces": "bigtrain.telemetry.wandb_dashboard",
    "matplotlib": "bigtrain.telemetry.figures",
    "tensorboardX": "bigtrain.telemetry.tensorboard_logger",
    "deepspeed": "bigtrain.engine.deepspeed_zero",
}
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    lazy: bool

    def reaches(self, package: str) -> bool:
        return self.imported == package or self.imported.startswith(f"{package}.")


def read_imports(module: str, source: str) -> Iterator[Import]:
    """Yield every import of ``source``; those inside a function or under TYPE_CHECKING are lazy."""
    tree = ast.parse(source)
    lazy_nodes = set()
    for node in ast.walk(tree):
        is_type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if is_type_checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lazy_nodes.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(module, name, node in lazy_nodes) for name in names)


def unit_of(module: str) -> str:
    """Return the room, or the room's room, that a module of bigtrain is in."""
    parts = module.split(".")[1:3]
    return ".".join(parts) if ".".join(parts) in FLOOR_OF else parts[0]


def floor_violations(imports: list[Import]) -> list[str]:
    """Return every import inside bigtrain that does not go down, and every unit without a floor."""
    violations = []
    for item in imports:
        if not item.importer.startswith("bigtrain.") or not item.imported.startswith("bigtrain."):
            continue
        importer, imported = unit_of(item.importer), unit_of(item.imported)
        if importer == imported or imported == "__version__":
            continue
        if importer not in FLOOR_OF or imported not in FLOOR_OF:
            violations.append(f"{item.importer} -> {item.imported}: give both a floor")
        elif FLOOR_OF[importer] <= FLOOR_OF[imported]:
            violations.append(f"{item.importer} -> {item.imported}: not downwards")
    return violations


def eager_closure(imports: list[Import], modules: set[str], start: str) -> set[str]:
    """Return what importing module ``start`` imports, without following calls."""
    edges: dict[str, set[str]] = {}
    for item in imports:
        if not item.lazy:
            # `from a.b import c` imports a, a.b, and a.b.c where that is a module.
            parts = item.imported.split(".")
            edges.setdefault(item.importer, set()).update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    reached, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(edges.get(module, ()))
            if module in modules and "." in module:
                waiting.append(module.rpartition(".")[0])
    return reached


def only_in_violations(imports: list[Import]) -> list[str]:
    return [
        f"{item.importer} -> {item.imported}"
        for item in imports
        for package, place in ONLY_IN.items()
        if item.reaches(package) and not item.importer.startswith(place)
    ]


def distributed_violations(imports: list[Import]) -> list[str]:
    return [
        f"{item.importer} -> {item.imported}"
        for item in imports
        if item.importer.startswith(("bigtrain.models", "bigtrain.data"))
        and (item.reaches("torch.distributed") or item.reaches("bigtrain.distributed.collectives"))
    ]


def unsafe_code(source: str) -> list[str]:
    """Return calls of eval and exec, imports of picklers, and torch.load without weights_only=True."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            weights_only = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True"
            if called in ("eval", "exec", "__import__") or (called == "torch.load" and not weights_only):
                found.append(f"line {node.lineno}: {called}")
    return found


def read_sources(folder: str) -> dict[str, str]:
    sources = {}
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


SOURCES = read_sources("bigtrain") | read_sources("launch")
IMPORTS = [item for module, source in SOURCES.items() for item in read_imports(module, source)]


def test_modules_import_downwards_only():
    assert floor_violations(IMPORTS) == []


@pytest.mark.parametrize(
    "line",
    [
        "from bigtrain.engine.build import build_engine",
        "from bigtrain import trainer",
        "import bigtrain.data.read.loader",
        "from bigtrain.nowhere import x",
    ],
)
def test_an_upward_sideways_or_unknown_import_is_found(line: str):
    assert floor_violations(list(read_imports("bigtrain.models.gpt", line)))
    assert floor_violations(list(read_imports("bigtrain.models.gpt", f"def f():\n    {line}")))


def test_heavy_packages_are_imported_only_when_needed():
    entered_by_call = {item.importer for item in IMPORTS if not item.lazy and item.imported.split(".")[0] in LAZY}
    closures = {module: eager_closure(IMPORTS, set(SOURCES), module) for module in SOURCES}
    assert {m: heavy for m in closures if (heavy := closures[m] & set(LAZY)) and m not in entered_by_call} == {}


def test_a_heavy_import_is_found_through_other_modules():
    imports = [
        *read_imports("bigtrain.a", "from bigtrain.b import c"),
        *read_imports("bigtrain.b.c", "import wandb"),
        *read_imports("bigtrain.lazy", "def f():\n    from bigtrain.b import c"),
    ]
    modules = {"bigtrain.a", "bigtrain.b", "bigtrain.b.c", "bigtrain.lazy"}
    assert "wandb" in eager_closure(imports, modules, "bigtrain.a")
    assert "wandb" not in eager_closure(imports, modules, "bigtrain.lazy")


def test_command_line_and_configuration_do_not_import_torch():
    launchers = {name for name in SOURCES if name.startswith(("launch.", "bigtrain.cli."))}
    modules = [*WITHOUT_TORCH, *sorted(launchers)]
    assert [m for m in modules if "torch" in eager_closure(IMPORTS, set(SOURCES), m)] == []
    own = [item for item in IMPORTS if item.importer in WITHOUT_TORCH_OF_THEIR_OWN and not item.lazy]
    assert [item for item in own if item.reaches("torch")] == []


def test_torch_is_found_where_it_is_imported():
    assert "torch" in eager_closure(IMPORTS, set(SOURCES), "bigtrain.run.trainer")


def test_packages_stay_in_their_files():
    assert only_in_violations(IMPORTS) == []
    assert only_in_violations(list(read_imports("bigtrain.run.trainer", "def f():\n    import wandb.sdk")))
    assert only_in_violations(list(read_imports("bigtrain.config", "from hydra import compose")))


def test_models_and_data_do_not_know_of_ranks():
    assert distributed_violations(IMPORTS) == []
    assert distributed_violations(list(read_imports("bigtrain.data.read.loader", "import torch.distributed as dist")))
    assert distributed_violations(list(read_imports("bigtrain.models.gpt", "from torch import distributed")))
    assert distributed_violations(
        list(read_imports("bigtrain.data.read.loader", "from bigtrain.distributed.collectives import x"))
    )


def test_nothing_runs_code_from_data():
    assert {module: found for module in SOURCES if (found := unsafe_code(SOURCES[module]))} == {}


@pytest.mark.parametrize(
    "source",
    ["eval('1')", "exec(x)", "import pickle", "from dill import load", "torch.load(f)", "torch.load(f, 'cpu')"],
)
def test_code_from_data_is_found(source: str):
    assert unsafe_code(source)


def test_models_are_allowed_to_evaluate():
    assert unsafe_code("model.eval()\ntorch.load(f, weights_only=True)") == []


def test_no_config_names_a_class_to_call():
    files = list((REPOSITORY / "configs").rglob("*.yaml"))
    assert len(files) > 20
    assert [str(path) for path in files if "_target_" in path.read_text(encoding="utf-8")] == []


def test_the_architecture_page_draws_these_floors():
    page = (REPOSITORY / "docs/architecture.md").read_text()
    drawn = re.findall(
        r"^ ?(\d+)  ((?:[\w.]+ )*[\w.]+)(?:  .*)?$", page.partition("## Floors")[2].partition("## ")[0], re.MULTILINE
    )
    assert [(int(number), names.split()) for number, names in reversed(drawn)] == list(enumerate(FLOORS))
