"""A bounded run of `fuzz`; the module itself tries as many as asked for."""

import io
from pathlib import Path
import tempfile
import zipfile

from hypothesis import HealthCheck, given, settings, strategies
import pytest

from fd_jax.convert import families, importing
from tests.convert import fuzz


@pytest.fixture(scope="module")
def seeds():
    """Undamaged shrunk files; the registry holds their sources while this module runs."""
    real, lazy_size = dict(families.SOURCES), importing._LAZY_SIZE
    fuzz.install()
    yield fuzz.seed_files()
    families.SOURCES.update(real)
    importing._LAZY_SIZE = lazy_size


def test_the_undamaged_fuzz_files_are_read(seeds, tmp_path):
    for container, data in seeds.items():
        source, name = fuzz.SEEDS[container]
        path = tmp_path / name
        if container == "sharded folder":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                archive.extractall(path)
        else:
            path.write_bytes(data)
        importing.read(source, path, allow_other_hash=True)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    container=strategies.sampled_from([*fuzz.SEEDS, "misnested"]),
    rng=strategies.randoms(use_true_random=False),
)
@pytest.mark.slow
def test_damaged_files_are_read_or_refused_with_one_error(seeds, container, rng):
    with tempfile.TemporaryDirectory() as folder:
        assert fuzz.one(container, seeds, rng, Path(folder)) in ("imported", "refused")
