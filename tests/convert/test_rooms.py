"""Imports inside the converter point one way: a reader knows no rules, a rule no family."""

import ast
from pathlib import Path

import pytest

import fd_jax.convert

ROOT = Path(fd_jax.convert.__file__).parent
MADE_OF = {"source", "layout", "huggingface", "family", "trees", "networks", "style", "facts"}
MADE_OF |= {"configs", "describing", "timm"}
COMMANDS = {"cli", "importing", "exporting", "verifying", "inspecting", "listing"}
COMMANDS |= {"identifying", "asking", "formats", "__main__"}
# Room -> the rooms it may import.
ALLOWED = {
    "containers": {"containers"},
    "published": {"published"},
    "rules": {"rules", "containers"},
    "made of": {"made of", "published", "rules", "containers"},
    "families": {"families", "made of", "rules", "containers"},
    "commands": {"commands", "families", "made of", "published", "rules", "containers"},
}
# What the converter may use of the rest, one entry per room.
OUTSIDE = {
    "containers": {"errors"},
    "published": {"errors", "models"},
    "rules": {"errors"},
    "made of": {"errors", "model_folder", "models"},
    "families": {"errors", "models"},
    "commands": {
        *("errors", "inference", "model_folder", "models"),
        *("checkpoint", "console", "storage"),
    },
}


def room(path):
    """The room of "a/b" below the converter."""
    first = path.split("/")[0]
    if first in MADE_OF:
        return "made of"
    return "commands" if first in COMMANDS else first


def imports(path):
    """Modules of fd_jax that a file imports, as "fd_jax/a/b"; names of objects may follow."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fd_jax":
            for alias in node.names:
                yield f"{node.module}.{alias.name}".replace(".", "/")
        elif isinstance(node, ast.Import):
            yield from (a.name.replace(".", "/") for a in node.names if a.name[:6] == "fd_jax")


FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def test_every_file_of_the_converter_belongs_to_a_room():
    assert {room(file.removesuffix(".py")) for file in FILES} == set(ALLOWED)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_rooms_below(file):
    own = room(file.removesuffix(".py"))
    for found in imports(ROOT / file):
        inside = found.removeprefix("fd_jax/convert/")
        if inside != found:
            assert room(inside) in ALLOWED[own], f"{file} imports {found}"
        else:
            assert found.split("/")[1] in OUTSIDE[own], f"{file} imports {found}"


@pytest.mark.parametrize("file", [f for f in FILES if room(f.removesuffix(".py")) == "commands"])
def test_a_command_knows_families_only_through_the_registry(file):
    modules = {path.stem for path in (ROOT / "families").glob("*.py")}
    for found in imports(ROOT / file):
        inside = found.removeprefix("fd_jax/convert/families/")
        assert inside == found or inside.split("/")[0] not in modules, f"{file} imports {found}"
