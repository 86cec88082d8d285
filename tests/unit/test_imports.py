"""The layers of the package: no import runs up, none runs in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "droprd"

# What each part may import of the others. Everyone may import errors, model and logs.
MAY_IMPORT = {
    "errors": set(),
    "logs": set(),
    "model": set(),
    "core": set(),
    "spool": {"core"},
    "net": {"core"},
    "settings": {"core", "spool"},
    "client": {"core", "spool", "settings.published"},
    "workers": {"core", "spool", "net", "client", "settings"},
    "angel": {"core", "spool", "net", "client", "settings"},
    "ctl": {"core", "spool", "net", "client", "settings"},
    "monitor": {"core", "spool", "net", "client", "settings"},
    "testing": {"core", "spool", "net", "client", "settings", "workers", "angel"},
    "": {"client", "core", "spool"},
}
CORE_FORBIDS = {"os", "socket", "time", "random", "threading", "logging", "pathlib"}


def imports_of(path: Path) -> set[str]:
    """Names of modules that a file imports anywhere in it, type checking included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) > 1:
        return relative.parts[0]
    return "" if relative.stem == "__init__" else relative.stem


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT[part]
    for name in imports_of(path):
        if not name.startswith("droprd."):
            continue
        target = name.split(".")[1]
        if target in ("errors", "model", "logs", part) or target in allowed:
            continue
        dotted = ".".join(name.split(".")[1:3])
        assert dotted in allowed, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda p: p.name)
def test_core_touches_no_world(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & CORE_FORBIDS


def test_only_fsops_syncs() -> None:
    for path in modules():
        if path.name == "fsops.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("fsync", "fdatasync"), path


def test_modules_go_round_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(("droprd", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in modules()
    }
    for name, path in names.items():
        graph[name] = {n for n in imports_of(path) if n in names and n != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_command_line_starts_without_network_libraries() -> None:
    code = (
        "import sys, droprd.ctl.main, droprd.ctl.control, droprd.ctl.send, droprd.ctl.receive;"
        "bad = {'aiohttp', 'pycurl', 'pydantic', 'rich', 'asyncio'} & set(sys.modules);"
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
