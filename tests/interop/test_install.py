"""The package installs and imports in a bare virtual environment of every Python there is here."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
IMPORT_ALL = """
import importlib, pkgutil, droprd
names = [m.name for m in pkgutil.walk_packages(droprd.__path__, "droprd.")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The conformance suites are for those who test with pytest; all else needs nothing more.
        assert name.startswith("droprd.testing.") and error.name == "pytest", (name, error)
assert "site-packages" in droprd.__file__, droprd.__file__
for name in droprd.__all__:
    getattr(droprd, name)
print(len(names))
"""

pytestmark = pytest.mark.slow


def outside() -> dict[str, str]:
    """The environment without what would lead back to this checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def candidates(version: str) -> Iterator[str]:
    """Interpreters that may be of this version: on the PATH, of the system, of pyenv."""
    for name in (f"python{version}", "python3"):
        for place in (None, "/usr/local/bin:/usr/bin"):
            found = shutil.which(name, path=place)
            if found is not None:
                yield found
    if shutil.which("pyenv") is not None:
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
        for found_at in Path(root.stdout.strip()).glob(f"versions/{version}.*/bin/python3"):
            yield str(found_at)


def interpreter(version: str) -> str:
    """A Python of this version that can make environments. Skips the test if there is none."""
    probe = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for path in candidates(version):
        done = subprocess.run([path, "-c", probe], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return path
    pytest.skip(f"there is no Python {version} here")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built once from a copy of this checkout."""
    path = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "tests", "__pycache__")
    shutil.copytree(ROOT, path / "source", ignore=ignored)
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--wheel-dir", str(path), str(path / "source")],
        check=True,
        env=outside(),
    )
    (made,) = path.glob("droprd-*.whl")
    return made


def requirements(wheel: Path) -> list[str]:
    """What the package needs at run time."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    needed = metadata.get_all("Requires-Dist") or []
    return [one for one in needed if "extra ==" not in one]


@pytest.mark.parametrize("version", VERSIONS)
def test_it_installs_and_imports_in_a_bare_environment(
    wheel: Path, version: str, tmp_path: Path
) -> None:
    made = tmp_path / "venv"
    subprocess.run([interpreter(version), "-m", "venv", "--without-pip", str(made)], check=True)
    python = str(made / "bin" / "python")
    pip = [*PIP, "--python", python, "install", "--no-compile"]
    needed = [*pip, "--constraint", str(LOCK), *requirements(wheel)]
    done = subprocess.run(needed, env=outside(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-1:]
        pytest.skip(f"the dependencies cannot be installed for Python {version}: {last}")
    subprocess.run([*pip, "--no-deps", str(wheel)], env=outside(), check=True)

    def run(*command: str) -> str:
        return subprocess.run(
            command,
            env=outside(),
            cwd=tmp_path,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        ).stdout.strip()

    assert int(run(python, "-c", IMPORT_ALL)) > 80
    number = wheel.name.split("-")[1]
    assert run(str(made / "bin" / "droprd"), "--version") == f"droprd {number}"
    assert number in run(str(made / "bin" / "droprctl"), "--version")
    assert (made / "bin" / "droprd-supervisor-listener").exists()
    (marker,) = made.glob("lib/*/site-packages/droprd/py.typed")
    assert marker.exists()
