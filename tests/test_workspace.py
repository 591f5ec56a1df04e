"""Rules of the workspace as a whole: imports, the namespace package, what is registered."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MEMBERS = sorted(REPOSITORY.glob("packages/*")) + sorted(REPOSITORY.glob("apps/*"))


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_imports_go_one_way():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout


def test_every_package_and_app_is_under_the_import_rules():
    rules = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    modules = {project(folder)["tool"]["uv"]["build-backend"]["module-name"] for folder in MEMBERS}
    assert modules <= set(rules["root_packages"])
    (layers,) = [contract["layers"] for contract in rules["contracts"] if contract["type"] == "layers"]
    assert modules <= {name.strip() for layer in layers for name in layer.split("|")}


def test_no_distribution_owns_the_namespace():
    assert not list(REPOSITORY.glob("*/src/nearfar/__init__.py"))
    assert not list(REPOSITORY.glob("*/*/src/nearfar/__init__.py"))
    assert not list(REPOSITORY.glob("apps/*/src/nearfar/apps/__init__.py"))


@pytest.mark.parametrize("folder", MEMBERS, ids=lambda folder: folder.name)
def test_members_have_a_readme_and_are_installed_by_the_workspace(folder):
    assert len((folder / "README.md").read_text()) > 200
    root = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert project(folder)["project"]["name"] in {name.split("[")[0] for name in root}
    for requirement in project(folder)["project"]["dependencies"]:
        if requirement.startswith("torch>"):
            assert requirement == "torch>=2.11,<2.15"


def test_torch_is_bounded_as_torchaudio_needs():
    assert "torch>=2.11,<2.15" in project(REPOSITORY / "shared")["project"]["dependencies"]
