"""The house: who may import whom, how long files and functions may grow, and what stays out of the fast path."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lowrank", "cluster", "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

#: Packages of ours that each package may import.
MAY_IMPORT = {"lowrank": {"lowrank"}, "cluster": {"lowrank", "cluster"}, "pipelines": set(PACKAGES)}
#: Third-party packages that only these places may import.
ONLY_IN = {
    "mlflow": {"pipelines/tracking.py"},
    "sqlalchemy": {"pipelines/tracking.py", "pipelines/lease_database.py"},
    "ray": {"cluster", "pipelines/session.py", "pipelines/stages/finetune.py"},
    "deepspeed": {"cluster"},
    "bitsandbytes": {"lowrank/quantization/nf4.py"},
    "gguf": {"lowrank/gguf.py"},
    "transformers": {"cluster", "pipelines/stages/shard.py"},
}
#: Too slow to import at module level outside of numerics: `rankline --help` must be instant.
HEAVY = {"ray", "torch", "transformers", "deepspeed", "mlflow", "bitsandbytes"}
HEAVY |= {"pyarrow", "matplotlib", "scipy", "pandas"}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(ast.parse(path.read_text())):
        root = module.partition(".")[0]
        if root in PACKAGES:
            assert root in MAY_IMPORT[package], f"{name_of(path)} imports {module}"
        allowed = ONLY_IN.get(root)
        if allowed is not None:
            assert any(name_of(path).startswith(place) for place in allowed), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_stages_do_not_import_each_other(path: Path) -> None:
    if path.parent != ROOT / "pipelines" / "stages" or path.name == "__init__.py":
        return
    for module in imports(ast.parse(path.read_text())):
        if module.startswith("pipelines.stages"):
            assert module == "pipelines.stages.base", f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_heavy_imports_wait(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "lowrank" or name_of(path) == "cluster/serving/router.py":  # for Ray alone
        return
    heavy = {module.partition(".")[0] for module in top_level_imports(ast.parse(path.read_text()))} & HEAVY
    assert not heavy, f"{name_of(path)} imports {sorted(heavy)} at module level"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{name_of(path)} has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            start = body[1].lineno if documented and len(body) > 1 else body[0].lineno
            length = (node.end_lineno or start) - start + 1
            assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"


def test_help_is_instant() -> None:
    """No clock: what makes help slow is what it imports."""
    code = "import sys; from pipelines.cli import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
    assert "pydantic" not in loaded


def test_no_machine_of_ours_is_named() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".json", "") and path.is_file():
            text = path.read_text()
            for word in ("/wo" + "rk/", "index-" + "url", "find-" + "links", "torch==2.13.0" + "+cpu"):
                assert word not in text, f"{name} holds {word!r}"
