"""The wheel and the source distribution, and their commands where there is no checkout."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import numpy as np
from PIL import Image
import pytest

from fd_jax import __version__, model_folder
from fd_jax.convert import families
from tests.convert import synthetic

pytestmark = pytest.mark.slow  # two builds, and fifteen commands that each import JAX

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = ("convert", "diagnose", "features", "plan", "report")
SOURCE = "dinov2_vits14_hf"
# Where the packages of this environment are.
DEPENDENCIES = [path for path in sys.path if path.endswith("-packages")]
# Folders of a checkout that are in .gitignore, beside hidden ones; data may be large.
MADE = {"build", "data", "dist", "fd_jax.egg-info", "runs", "teachers"}


def ignored(folder, names):
    """For `copytree`: what a checkout holds beside its files."""
    top = pathlib.Path(folder) == ROOT
    return {
        name
        for name in names
        if name == "__pycache__" or (top and (name in MADE or name[0] == "." and name != ".ci"))
    }


def built(tree, kind, folder):
    """Builds the "sdist" or "wheel" of a tree into a folder; returns its file."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", f"--outdir={folder}"]
    done = subprocess.run([*command, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = folder.iterdir()
    return file


def contents(wheel):
    """Digests of the files in a wheel by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith("/RECORD")  # the list of the others
        }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, the wheel of the checkout, and the unpacked former."""
    root = tmp_path_factory.mktemp("distributions")
    tree = root / "tree"
    shutil.copytree(ROOT, tree, ignore=ignored)
    wheel = built(tree, "wheel", root / "wheel")
    sdist = built(tree, "sdist", root / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return sdist, wheel, unpacked


def test_an_editable_install_is_found_beside_the_clone(distributions, tmp_path):
    """The clone is called fd_jax as well, and a script may lie in the folder that holds it."""
    *_, unpacked = distributions
    clone = shutil.copytree(unpacked, tmp_path / "fd_jax")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(DEPENDENCIES)}  # of the build
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--editable", clone], check=True, env=found)
    script = "import importlib.util as u; print(u.find_spec('fd_jax').origin)"
    done = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(clone / "fd_jax" / "__init__.py"), done.stderr


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(distributions):
    _, wheel, _ = distributions
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fd_jax").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"fd_jax/py.typed", "fd_jax/convert/__main__.py"} <= package
    described = f"fd_jax-{__version__}.dist-info/"
    found = set(contents(wheel))
    assert {name for name in found if not name.startswith(described)} == package
    assert {f"{described}licenses/LICENSE", f"{described}entry_points.txt"} <= found


def test_the_source_distribution_builds_the_same_wheel(distributions, tmp_path):
    sdist, wheel, unpacked = distributions
    assert sdist.name == f"fd_jax-{__version__}.tar.gz"
    again = built(unpacked, "wheel", tmp_path)
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_source_distribution_has_what_its_tests_and_training_need(distributions):
    _, _, unpacked = distributions
    for name in ("train.py", "configs/base.py", "tests/tiny.py", "docs/reference.md", "Makefile"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(unpacked.rglob("*.pyc"))


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """Runs a command of the wheel in an empty folder, in an environment without the checkout."""
    _, wheel, _ = distributions
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    paths = sysconfig.get_paths(vars={"base": str(root / "venv"), "platbase": str(root / "venv")})
    # The dependencies are those of this environment. A line of a .pth file adds a folder, but not
    # the .pth files in it, by which this environment finds the checkout.
    site = pathlib.Path(paths["purelib"])
    (site / "dependencies.pth").write_text("\n".join(DEPENDENCIES) + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    python = root / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    env["JAX_PLATFORMS"] = "cpu"

    def run(name, *arguments, cwd=None):
        folder = cwd or tmp_path_factory.mktemp("empty")
        command = [root / "venv" / "bin" / name, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)

    return run


def succeeded(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_commands_find_the_wheel_and_not_the_checkout(installed):
    code = "import fd_jax, sys; print(fd_jax.__file__); print(sys.path)"
    shown = succeeded(installed("python", "-c", code))
    assert "installed" in shown.splitlines()[0]
    assert str(ROOT) not in shown.replace(str(pathlib.Path(sys.prefix)), "")
    assert "No module named 'configs'" in installed("python", "-c", "import configs").stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_version_of_every_command(name, installed):
    assert succeeded(installed(f"fd-jax-{name}", "--version")) == f"fd_jax {__version__}\n"
    shown = succeeded(installed(f"fd-jax-{name}", "--help"))
    assert f"fd-jax-{name} " in shown and "python -m" not in shown
    assert "--version" in shown


def test_mistakes_are_one_message(installed):
    done = installed("fd-jax-plan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --config is missing; see fd-jax-plan --help\n"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for k in range(3):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


def test_convert(installed, tmp_path):
    source = families.SOURCES[SOURCE]
    given = synthetic.structure(SOURCE, small=False)
    file = synthetic.write(given, synthetic.values(given), tmp_path)
    output = tmp_path / "model"
    flags = (f"--source={SOURCE}", f"--input={file}", f"--output={output}", "--allow-other-hash")
    shown = succeeded(installed("fd-jax-convert", "import", *flags))
    assert shown.endswith(f"wrote {output}\n")
    assert model_folder.load_spec(output).arch == source.parts[source.default_part].spec.arch
    assert SOURCE in succeeded(installed("fd-jax-convert", "sources"))


def test_features(installed, teacher, pictures, tmp_path):
    flags = (f"--model={teacher}", f"--input={pictures}", "--output=features.npz")
    assert "6, 48" in succeeded(installed("fd-jax-features", *flags, cwd=tmp_path))
    assert np.load(tmp_path / "features.npz")["class_names"].tolist() == ["ant", "bee"]


def test_report(installed, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    succeeded(installed("fd-jax-report", f"--workdir={workdir}"))
    assert "<html" in (workdir / "report" / "report.html").read_text()


def test_diagnose(installed, teacher, pictures, tmp_path):
    flags = (f"--model=tiny={teacher}", f"--data={pictures}", "--figures=distance,pca")
    succeeded(installed("fd-jax-diagnose", *flags, "--output=figures", cwd=tmp_path))
    assert (tmp_path / "figures" / "distance.png").exists()
    assert "<html" in (tmp_path / "figures" / "report.html").read_text()


CONFIG = """
import json
import ml_collections

def get_config():
    return ml_collections.ConfigDict(json.load(open({path!r})))
"""


def test_plan(installed, finished, tmp_path):
    # A config is any file with get_config(); this one takes what a run has stored.
    path = str(finished[0] / "config.json")
    (tmp_path / "config.py").write_text(CONFIG.format(path=path))
    flags = ("--config=config.py", "--topology=v5e:2x2", "--effort=-1", "--output=plan.json")
    shown = succeeded(installed("fd-jax-plan", *flags, "--config.batch_size=32", cwd=tmp_path))
    assert "v5e:2x2" in shown and (tmp_path / "plan.json").exists()
