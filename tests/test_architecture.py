"""The edges of the tree, read from its imports: code moves inward, never out."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("puzzles", "attribution", "server", "clients")
MAY_IMPORT = {
    "puzzles": {"puzzles"},
    "attribution": {"puzzles", "attribution"},
    "clients": {"puzzles", "attribution", "clients"},
    "server": {"puzzles", "attribution", "server"},
}
COMMAND_LINE = re.compile(r"server/(cli|demo|commands/\w+)\.py")
MAKES_THE_DEMO_MODEL = {"puzzles/train.py", "puzzles/evaluate.py", "puzzles/tokenizer.py"}
LONGEST_FILE, LONGEST_FUNCTION = 300, 40


@dataclass(frozen=True)
class Module:
    path: str
    source: str

    @property
    def package(self) -> str:
        return self.path.split("/")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)


@cache
def modules() -> tuple[Module, ...]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return tuple(Module(file.relative_to(ROOT).as_posix(), file.read_text()) for file in files)


def imports(module: Module, *, run: bool = False) -> set[str]:
    """The dotted names that a module imports, inside functions too; `run`: not those for types alone."""
    types = {
        id(inner)
        for node in ast.walk(module.tree if run else ast.Module([], []))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(module.tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(name: str) -> str:
    return name.split(".")[0]


def wrong_edges(module: Module) -> Iterator[str]:
    """The imports of a module that its place in the tree does not allow."""
    allowed = MAY_IMPORT[module.package] | ({"clients"} if COMMAND_LINE.fullmatch(module.path) else set())
    for name in imports(module):
        package = top(name)
        if package in PACKAGES and package not in allowed:
            yield name
        if package in ("fastapi", "starlette", "uvicorn") and module.package != "server":
            yield name
        if package == "nnsight" and not module.path.startswith("attribution/model/"):
            yield name
    inside = module.path.startswith("attribution/model/")
    if not inside and module.path not in MAKES_THE_DEMO_MODEL:
        yield from (name for name in imports(module, run=True) if top(name) == "transformers")


def reads_environment(module: Module) -> bool:
    """Whether a module touches `os.environ` or `os.getenv`, however imported."""
    names = {"environ", "environb", "getenv", "getenvb"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names})
        for node in ast.walk(module.tree)
    )


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Lines of a function that hold code: no docstring, no comments, no blank lines."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    skipped = range(first.lineno, (first.end_lineno or 0) + 1) if is_docstring else range(0)
    lines = range(function.lineno, (function.end_lineno or 0) + 1)
    texts = [source[line - 1].strip() for line in lines if line not in skipped]
    return sum(bool(text) and not text.startswith("#") for text in texts)


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def undocumented(module: Module) -> Iterator[str]:
    """The public module, classes, functions and methods that say nothing of what they are."""
    empty = not module.tree.body
    if not empty and ast.get_docstring(module.tree) is None:
        yield module.path
    for node in _public(module.tree):
        if ast.get_docstring(node) is None:
            yield f"{module.path}: {node.name}"


def _public(
    parent: ast.Module | ast.ClassDef,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in parent.body:
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_definition and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def declared() -> set[str]:
    """The distributions that the package depends on, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        one for name, extra in project.get("optional-dependencies", {}).items() if name != "dev" for one in extra
    ]
    return {re.split(r"[^A-Za-z0-9_-]", one)[0].lower().replace("-", "_") for one in wanted}


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.path)
def test_a_module_imports_only_what_its_ring_allows(module: Module):
    assert not sorted(wrong_edges(module))


def test_only_the_settings_read_the_environment():
    readers = [module.path for module in modules() if reads_environment(module)]
    assert readers == ["server/settings.py"], "server.settings has environment_without_settings() for child processes"


def test_whatever_is_imported_is_declared_as_a_dependency():
    known = declared() | set(PACKAGES) | sys.stdlib_module_names
    missing = {(m.path, top(name)) for m in modules() for name in imports(m) if top(name) not in known}
    assert not missing


def test_no_file_is_longer_than_300_lines():
    assert not [module.path for module in modules() if len(module.source.splitlines()) > LONGEST_FILE]


def test_no_function_is_longer_than_40_lines_of_code():
    assert not [
        f"{module.path}: {function.name}"
        for module in modules()
        for function in functions(module)
        if code_lines(function, module.source.splitlines()) > LONGEST_FUNCTION
    ]


def test_everything_public_says_what_it_is():
    assert not [name for module in modules() for name in undocumented(module)]


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("puzzles/x.py", "import attribution", "attribution"),
        ("puzzles/x.py", "from transformers import Qwen3Config", "transformers.Qwen3Config"),
        ("puzzles/train.py", "from transformers import Qwen3Config", None),
        ("puzzles/train.py", "import nnsight", "nnsight"),
        ("server/x.py", "if TYPE_CHECKING:\n    import transformers", None),
        ("server/x.py", "if TYPE_CHECKING:\n    import clients", "clients"),
        ("attribution/x.py", "def f():\n    from server.app import create_app", "server.app.create_app"),
        ("attribution/x.py", "import transformers.utils", "transformers.utils"),
        ("attribution/x.py", "import fastapi", "fastapi"),
        ("attribution/model/x.py", "import nnsight, transformers", None),
        ("server/routes/x.py", "from clients import ModelClient", "clients.ModelClient"),
        ("server/commands/x.py", "from clients import ModelClient", None),
        ("server/x.py", "import fastapi, attribution.model.load", None),
        ("server/x.py", "from nnsight import save", "nnsight.save"),
        ("clients/x.py", "import server.schemas", "server.schemas"),
    ],
)
def test_the_rules_see_a_wrong_import_and_allow_a_right_one(path: str, source: str, wrong: str | None):
    assert list(wrong_edges(Module(path, source))) == ([] if wrong is None else [wrong])


def test_the_other_rules_see_what_they_look_for():
    assert reads_environment(Module("x.py", "import os\nos.environ['A']"))
    assert reads_environment(Module("x.py", "from os import getenv"))
    assert not reads_environment(Module("x.py", "import os\nos.getpid()"))
    source = 'def f():\n    """Doc.\n\n    More.\n    """\n    # why\n\n    return 1\n'
    assert code_lines(next(functions(Module("x.py", source))), source.splitlines()) == 2
    bare = "class A:\n    def b(self): ...\n    def _c(self): ...\n"
    assert list(undocumented(Module("x.py", bare))) == ["x.py", "x.py: A", "x.py: b"]
    assert list(undocumented(Module("x.py", ""))) == []
