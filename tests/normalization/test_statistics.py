"""The file of statistics: what it keeps, and what is refused."""

import dataclasses

from etils import epath
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.errors import ConfigError
from fd_jax.normalization import spectrum, statistics
from tests import tiny


@pytest.fixture
def origin(teacher):
    return statistics.Origin.of(teacher, tiny.teacher_spec(), stages=0, after_norm=True)


@pytest.fixture
def spectra():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(100, 6))
    found = spectrum.Spectrum.of(100, tokens.mean(axis=0), np.cov(tokens.T))
    return {"cls": found, "patch": dataclasses.replace(found, tokens=1600)}


@pytest.fixture
def path(tmp_path, origin, spectra):
    statistics.save(epath.Path(tmp_path / "stats.npz"), origin, spectra, data={"name": "x"})
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"]
    return tmp_path / "stats.npz"


def test_what_is_read_is_what_was_written(path, origin, spectra):
    found = statistics.load(path, origin)
    assert found.keys() == spectra.keys()
    for group, want in spectra.items():
        assert found[group].tokens == want.tokens
        for name in ("mean", "values", "vectors"):
            np.testing.assert_array_equal(getattr(found[group], name), getattr(want, name))


@pytest.mark.parametrize(
    "field,value", [("source", "dino"), ("image_size", 48), ("stages", 3), ("after_norm", False)]
)
def test_statistics_of_other_tokens_are_refused_with_both_sides(path, origin, field, value):
    wanted = dataclasses.replace(origin, **{field: value})
    here = getattr(origin, field)
    with pytest.raises(ConfigError, match=f"{field}: measured {here!r}, here {value!r}"):
        statistics.load(path, wanted)


def test_other_weights_of_one_network_are_told_apart(path, origin, teacher, tmp_path):
    spec, parts = model_folder.load(teacher)
    same, changed = tmp_path / "same", tmp_path / "changed"
    model_folder.save(same, spec, parts)
    parts["encoder"]["cls_token"] = parts["encoder"]["cls_token"] + 1e-3
    model_folder.save(changed, spec, parts)
    (same / "digests.json").unlink()  # a folder of an earlier version
    for folder in (teacher, same):
        statistics.load(path, statistics.Origin.of(str(folder), spec, stages=0, after_norm=True))
    other = statistics.Origin.of(str(changed), spec, stages=0, after_norm=True)
    with pytest.raises(ConfigError, match="weights: measured"):
        statistics.load(path, other)


@pytest.mark.parametrize(
    "content", [b"", b"not a file of arrays", "cut"], ids=["empty", "text", "cut"]
)
def test_a_damaged_file_is_one_message(path, origin, content):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(ConfigError, match=r"stats.npz is no file of statistics, or is damaged"):
        statistics.load(path, origin)


def test_a_missing_file_names_the_command_that_writes_it(tmp_path, origin):
    with pytest.raises(ConfigError, match="no statistics at .*target_stats --teacher=DIR"):
        statistics.load(tmp_path / "none.npz", origin)
