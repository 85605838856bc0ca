"""Every test runs on eight fake CPU devices, in float32 with exact matmuls."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
# Tests use the same small programs again and again, often in processes of their own. With this
# cache, each program is compiled once per run of the suite; .ci/run gives both suites the same one.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="fd_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


# Files that take longest, so that the two workers of `make tests` end at about the same time.
LONGEST_FIRST = (
    "training/test_meshes.py",
    "training/test_loop.py",
    "training/test_processes.py",
    "convert/families/test_sources.py",
    "test_configs.py",
    "test_finetune.py",
    "diagnose/test_landscape.py",
    "data/test_pipeline.py",
    "models/test_swin.py",
    "test_report.py",
)


def pytest_collection():
    """Imports make a million objects that stay; the collector would search them again and again."""
    gc.disable()


def pytest_collection_finish():
    """From here on the collector leaves out whatever the modules of the tests have imported."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Orders files, and leaves the tests of each file in their order."""

    def rank(item):
        path = item.path.as_posix()
        matches = (i for i, name in enumerate(LONGEST_FIRST) if path.endswith(f"tests/{name}"))
        return next(matches, len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Torch starts each process from another random state; its models are to be the same anywhere.

    Before a test's fixtures, because those of whole modules make models too.
    """
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded_data(tmp_path_factory):
    """A data_dir in which photos and digits are prepared."""
    from fd_jax.data import prepare

    folder = str(tmp_path_factory.mktemp("data"))
    for name in ("photos", "digits"):
        prepare.prepare(name, data_dir=folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A toy-sized model folder with random weights."""
    from tests import tiny

    return tiny.save_teacher(tmp_path_factory.mktemp("teachers") / "tiny")


@pytest.fixture(scope="session")
def finished(teacher, embedded_data, tmp_path_factory):
    """Workdir and result of an uninterrupted run of `tiny.config`."""
    from fd_jax.tasks.distill import DistillTask
    from fd_jax.training import loop
    from tests import tiny

    workdir = tmp_path_factory.mktemp("finished")
    config = tiny.config(teacher, **{"data.data_dir": embedded_data})
    return workdir, loop.fit(DistillTask(config), config, workdir)
