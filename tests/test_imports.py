"""The import graph is the pipeline, and nothing is imported that setup.cfg does not declare."""

from __future__ import annotations

import ast
import configparser
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIPELINE = ("rewards", "sft_core", "eval", "grpo_core", "benchmarks")  # each imports only what stands left of it
SOURCES = sorted(path for package in PIPELINE for path in (ROOT / package).rglob("*.py"))

# A distribution whose import name is another one.
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL"}


class Import:
    """One import statement's module, and whether it runs when the file is imported."""

    def __init__(self, module: str, line: int, lazy: bool) -> None:
        self.module, self.line, self.lazy = module, line, lazy
        self.top = module.partition(".")[0]


def imports(source: str, package: str) -> list[Import]:
    """Every import in a file of `package`; a relative one is named in full."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                yield Import(f"{package}.{module}" if child.level else module, child.lineno, lazy)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                names = [arg.value for arg in child.args[:1] if isinstance(arg, ast.Constant)]
                yield from (Import(str(name), child.lineno, lazy) for name in names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            # `if TYPE_CHECKING:` never runs, so what it imports need not be installed.
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from walk(child, lazy or inside or typing_only)

    return list(walk(ast.parse(source), lazy=False))


def import_name(requirement: str) -> str:
    """`trl==1.16.0` is imported as `trl`."""
    name = requirement
    for sign in "<>=!~[; ":
        name = name.partition(sign)[0]
    return IMPORT_NAMES.get(name.lower(), name.lower().replace("-", "_"))


def declared() -> tuple[set[str], set[str]]:
    """Import names of the core dependencies and of those that only extras bring."""
    config = configparser.ConfigParser(inline_comment_prefixes=("#",))
    config.read(ROOT / "setup.cfg")

    def names(text: str) -> set[str]:
        return {import_name(line) for line in text.splitlines() if line.strip() and not line.strip().startswith("#")}

    core = names(config["options"]["install_requires"])
    extras = set().union(*(names(text) for text in config["options.extras_require"].values()))
    return core, extras - core


def arrows_the_wrong_way(source: str, package: str) -> list[str]:
    """Imports of a package that stands right of `package` in the pipeline, or of the tests."""
    right = {*PIPELINE[PIPELINE.index(package) + 1 :], "tests"}
    return [f"line {found.line}: {found.module}" for found in imports(source, package) if found.top in right]


def undeclared(source: str, path: str) -> list[str]:
    """Third-party imports that a plain `pip install .` does not bring and that are not put off until they are used."""
    core, extras = declared()
    package = path.partition("/")[0]
    allowed = {*sys.stdlib_module_names, *PIPELINE, *core}
    compares = path == "benchmarks/compare_trl.py" or path.endswith("/theirs.py")  # TRL's side of the comparison

    def fine(found: Import) -> bool:
        if found.top == "trl":
            return compares
        return found.top in allowed or (found.top in extras and found.lazy)

    return [f"line {found.line}: {found.module}" for found in imports(source, package) if not fine(found)]


# The rooms of a package, in order: a file imports only from its own line and from lines above it. A name is a folder or
# a file of the package; REST stands for its other files.
REST = "..."
ROOMS: dict[str, tuple[str, ...]] = {
    "sft_core": ("errors precision pairs config", "text", "model", "learn", "run", REST),
    "grpo_core": (REST, "forecast", "doctor", "job warmstart dryrun train one_page", "pipeline"),
}
LONGEST = 300  # lines of a file


def module_of(path: Path, root: Path = ROOT) -> str:
    """The name by which a file is imported; a package's `__init__.py` by the package's."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Who imports whom among these modules, imports for type checking and inside functions included."""
    edges: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # `from package import module` names the module, `from module import thing` does not.
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [each if each in sources else str(node.module) for each in named]
            else:
                continue
            edges[name] |= {each for each in found if each in sources and each != name}
    return edges


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, the first named again at its end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (visit(each, [*path, name]) for each in sorted(edges[name]))), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(edges))), [])


def room_of(module: str, rooms: Sequence[str]) -> int:
    """The line of its package's rooms in which a module stands."""
    top = module.split(".")[1] if "." in module else REST
    named = [line for line, names in enumerate(rooms) if top in names.split()]
    return named[0] if named else rooms.index(REST)


def wrong_rooms(edges: Mapping[str, set[str]], package: str) -> list[str]:
    """Imports within a package that lead to a room further down the list."""
    rooms = ROOMS[package]
    inside = [name for name in edges if name.startswith(f"{package}.")]
    return [
        f"{name} imports {each}"
        for name in inside
        for each in sorted(edges[name])
        if each.startswith(f"{package}.") and room_of(each, rooms) > room_of(name, rooms)
    ]


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return graph({module_of(path): path.read_text(encoding="utf-8") for path in SOURCES})


def test_no_file_imports_another_in_a_circle(edges: dict[str, set[str]]) -> None:
    assert circle(edges) == []


@pytest.mark.parametrize("package", ROOMS)
def test_every_import_inside_a_package_leads_to_an_earlier_room(edges: dict[str, set[str]], package: str) -> None:
    assert wrong_rooms(edges, package) == []


@pytest.mark.parametrize("package", ROOMS)
def test_every_folder_of_a_package_is_a_room_with_a_description(package: str) -> None:
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    named = {name for line in ROOMS[package] for name in line.split()}
    assert folders <= named
    for folder in folders:
        lines = (ast.get_docstring(ast.parse((ROOT / package / folder / "__init__.py").read_text())) or "").splitlines()
        assert 3 <= len(lines) <= 8, f"{package}/{folder}/__init__.py: say in about five lines what is in it"


def test_no_file_is_too_long_to_read() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    long = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "import b", "b": "import c", "c": ""}, []),
        ({"a": "import b", "b": "import c", "c": "def late():\n    import a"}, ["a", "b", "c", "a"]),
        ({"p.a": "from p import b", "p.b": "if TYPE_CHECKING:\n    from p.a import X"}, ["p.a", "p.b", "p.a"]),
        ({"p": "", "p.a": "from p import thing", "p.b": "from p.a import X"}, []),
    ],
)
def test_the_walk_sees_a_circle(sources: dict[str, str], found: list[str]) -> None:
    assert circle(graph(sources)) == found


@pytest.mark.parametrize(
    ("sources", "wrong"),
    [
        ({"sft_core.text.a": "import sft_core.model.b", "sft_core.model.b": ""}, 1),
        ({"sft_core.model.b": "import sft_core.text.a", "sft_core.text.a": ""}, 0),
        ({"sft_core.config": "import sft_core.train", "sft_core.train": ""}, 1),
        ({"sft_core.text.a": "import sft_core.text.b", "sft_core.text.b": ""}, 0),
    ],
)
def test_the_walk_sees_an_import_from_a_later_room(sources: dict[str, str], wrong: int) -> None:
    assert len(wrong_rooms(graph(sources), "sft_core")) == wrong


def test_every_import_points_left_along_the_pipeline() -> None:
    found = {path: arrows_the_wrong_way(path.read_text(), path.relative_to(ROOT).parts[0]) for path in SOURCES}
    assert {path.name: wrong for path, wrong in found.items() if wrong} == {}


def test_every_third_party_import_is_declared_in_setup_cfg() -> None:
    found = {path: undeclared(path.read_text(), path.relative_to(ROOT).as_posix()) for path in SOURCES}
    assert {path.name: wrong for path, wrong in found.items() if wrong} == {}


def test_rewards_needs_the_standard_library_alone() -> None:
    for path in (ROOT / "rewards").rglob("*.py"):
        outside = [i.module for i in imports(path.read_text(), "rewards")]
        assert all(name.partition(".")[0] in {*sys.stdlib_module_names, "rewards"} for name in outside), path


def test_the_packages_of_the_pipeline_are_the_ones_that_are_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    installed = [name.strip() for name in config["options"]["packages"].split(",")]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in SOURCES}
    assert sorted(installed) == sorted(folders | set(PIPELINE))
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= set(PIPELINE[:4])


@pytest.mark.parametrize(
    ("source", "package", "wrong"),
    [
        ("import grpo_core.step", "sft_core", 1),
        ("from eval.sampling import sample", "sft_core", 1),
        ("def late():\n    from eval import sampling", "rewards", 1),
        ("if TYPE_CHECKING:\n    from grpo_core.config import GRPOConfig", "eval", 1),
        ("importlib.import_module('grpo_core')", "eval", 1),
        ("from tests.helpers import tiny_policy", "benchmarks", 1),
        ("from sft_core.learn.rows import Rows\nimport rewards", "eval", 0),
        ("from .rows import Rows", "sft_core", 0),
    ],
)
def test_the_walk_sees_an_arrow_the_wrong_way(source: str, package: str, wrong: int) -> None:
    assert len(arrows_the_wrong_way(source, package)) == wrong


@pytest.mark.parametrize(
    ("source", "path", "wrong"),
    [
        ("import scipy", "sft_core/a.py", 1),
        ("import yaml, torch.nn", "sft_core/a.py", 0),
        ("import pyyaml", "sft_core/a.py", 1),
        ("import peft", "sft_core/a.py", 1),
        ("class A:\n    import peft", "sft_core/a.py", 1),
        ("def late():\n    from peft import LoraConfig", "sft_core/a.py", 0),
        ("if TYPE_CHECKING:\n    import peft", "sft_core/a.py", 0),
        ("def late():\n    import trl", "grpo_core/a.py", 1),
        ("def late():\n    import trl", "benchmarks/speed.py", 1),
        ("import trl", "benchmarks/parity/ours.py", 1),
        ("import trl", "benchmarks/parity/theirs.py", 0),
    ],
)
def test_the_walk_sees_an_undeclared_import(source: str, path: str, wrong: int) -> None:
    assert len(undeclared(source, path)) == wrong
