"""The package as a whole: its rooms, what imports what, and that names are used once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

ENGINE, TRANSFORMS = ROOT / "patcher/spikepatch", ROOT / "transforms/spikepatch_transforms"


def module_name(path: Path) -> str:
    """``patcher/spikepatch/plans/plan.py`` -> ``spikepatch.plans.plan``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted([*ENGINE.rglob("*.py"), *TRANSFORMS.rglob("*.py")])}


def imports(path: Path) -> Iterator[str]:
    """Our modules that a module imports, wherever in it; those for type checkers alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else node.module for name in inside]
        yield from (name for name in found if name in MODULES)


GRAPH = {name: set(imports(path)) for name, path in MODULES.items()}

#: What stands beside the folders, and no more.
LOOSE = {"__init__", "__main__", "_version", "cli", "errors", "progress", "quiet"}

#: From left to right; a module imports its own rank and those to its left.
RANKS = (
    ("_version", "errors", "progress", "quiet"),
    ("source",),
    ("data",),
    ("residual",),
    ("runtime",),
    ("plans",),
    ("spikepatch_transforms",),
    ("recipes",),
    ("apply.values",),
    ("apply.disk",),
    ("apply.generated",),
    ("apply.live",),
    ("apply.folder", "apply.own_file"),
    ("report",),
    ("spikes",),
    ("auditing",),
    ("preflight",),
    ("training",),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def rank(module: str) -> int:
    local = module.removeprefix("spikepatch.")
    places = {name: i for i, names in enumerate(RANKS) for name in names}
    parts = local.split(".")
    found = [places[place] for n in (2, 1) if (place := ".".join(parts[:n])) in places]
    assert found, f"{module} has no place in RANKS"
    return found[0]


def test_imports_go_one_way() -> None:
    assert sum(map(len, GRAPH.values())) > 50
    for module, imported in GRAPH.items():
        if module != "spikepatch":
            assert not {other for other in imported if rank(other) > rank(module)}, module


def test_the_writer_of_source_code_stands_alone() -> None:
    """``own_file`` imports no other applier, and only its one public name is imported from outside. (How a file is put
    in place is the same for all.)
    """
    for module, imported in GRAPH.items():
        inside = {other for other in imported if other.startswith("spikepatch.apply.own_file")}
        if module.startswith("spikepatch.apply.own_file"):
            others = imported - inside - {"spikepatch.apply.disk.atomic"}
            assert not {other for other in others if other.startswith("spikepatch.apply")}, module
        else:
            assert inside <= {"spikepatch.apply.own_file.codemod"}, module


def test_no_cycles() -> None:
    """Not even through imports inside functions."""
    left = {module: set(imported) for module, imported in GRAPH.items() if module != "spikepatch"}
    while left:
        free = [module for module, imported in left.items() if not imported & left.keys()]
        assert free, left
        for module in free:
            del left[module]


def test_few_modules_are_loose() -> None:
    assert {path.stem for path in ENGINE.glob("*.py")} == LOOSE


def test_names_are_used_once() -> None:
    """A file's name, and a class's or a type's. A command's file is named as the function that it calls."""
    files: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if path.stem != "__init__" and module.split(".")[1] != "commands":
            files.setdefault(path.stem, []).append(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(module)
            elif isinstance(node, ast.Assign):
                types = [target.id for target in node.targets if isinstance(target, ast.Name)]
                for name in (name for name in types if name[:1].isupper() and not name.isupper()):
                    names.setdefault(name, []).append(module)
    assert len(files) > 80
    assert len(names) > 100
    assert {name: where for name, where in files.items() if len(where) > 1} == {}
    assert {name: where for name, where in names.items() if len(where) > 1} == {}


#: What is written once, as a search for it -> where. ``runtime/`` stands alone: its copies are compared with ours.
ONCE: dict[str, set[str]] = {
    r"\.std\(-1": {"residual.points"},  # sigma, the size of the stream
    r"sqrt\(width\)\"": {"plans.edits", "runtime.embedding"},  # a factor that goes with the width
    r"\"\*\" if \w+\.isdec": {"residual.map", "runtime.embedding"},  # the pattern of a name
    r"isdigit|isnumeric": set(),  # what is a number in a name: isdecimal
    r"id\(\w+\): name for name, \w+ in .*parameters": set(),  # the names of one tensor
    r"setdefault\(id\((parameter|tensor)\)": {"source.tied", "apply.folder.fresh_process"},  # which stands alone too
    r"map_arg": {"residual.execute"},  # a graph on numbers
    r"\.carries = ": {"residual.facts"},  # facts that a stream rests on
    r"get_type_hints\(": {"source.typed", "recipes.files"},  # data from JSON; and options from TOML
    r"parameters, such as": {"plans.in_words"},  # a plan in words
    r"def _?from_dict\(": {"plans.plan", "residual.map", "spikes.detector"},  # public
}


def test_what_is_written_once() -> None:
    texts = {name.removeprefix("spikepatch."): path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    for wanted, places in ONCE.items():
        assert {name for name, text in texts.items() if re.search(wanted, text)} == places, wanted


def test_what_transforms_import() -> None:
    """What anyone's own transform needs, too."""
    allowed = {"spikepatch.plans.plan", "spikepatch.plans.entrances", "spikepatch.residual.map", "spikepatch.errors"}
    checked = 0
    for module, imported in GRAPH.items():
        if module.startswith("spikepatch_transforms"):
            assert {name for name in imported if not name.startswith("spikepatch_transforms")} <= allowed, module
            checked += bool(imported)
    assert checked >= 5


def test_transforms_are_short() -> None:
    lengths = [len(path.read_text().splitlines()) for path in TRANSFORMS.glob("*.py")]
    assert len(lengths) > 7
    assert max(lengths) <= 150


def private_names(path: Path) -> Iterator[str]:
    """Attributes, imports and words of the form ``_name`` that the module does not define itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names = [node.value]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and "spikepatch" not in node.module:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        yield from (n for n in names if n.startswith("_") and not n.startswith("__") and len(n) > 1 and n not in own)


def test_private_names_of_libraries_are_in_one_room() -> None:
    """But for ATen operations, which are called so; and generated code, which stands alone."""
    assert len(set(private_names(MODULES["spikepatch.source.private"]))) > 20
    aten = {"_softmax", "_safe_softmax", "_to_copy", "_add_batch_dim"}
    python = {"_getframe"}
    wandb = {"_step"}  # a column of its exports
    ours = {"_spikepatch_plan", "_spikepatch_blueprint"}
    callbacks = {"_seen", "_last", "_missed", "_nan_since", "_saved"}  # attributes of the detector's callback, by name
    for module, path in MODULES.items():
        if module != "spikepatch.source.private" and not module.startswith("spikepatch.runtime."):
            assert not set(private_names(path)) - aten - python - wandb - ours - callbacks, module
