"""The search for settings that fit, by a formula in the place of the compiler."""

import dataclasses
import types

import pytest

from fd_jax.errors import ConfigError
from fd_jax.plan import advice, experiment, table
from fd_jax.plan.compiled import DoesNotFitError
from tests import tiny

SHARDED = {"mesh.data": 1, "mesh.fsdp": -1}


@pytest.fixture(scope="module")
def planned(teacher):
    return experiment.define(tiny.config(teacher))


def memory(config):
    """Bytes that a run needs; without changes 100."""
    needed = 100.0
    needed *= {"": 1.0, "dots": 0.9, "full": 0.6}[config.remat]
    needed *= 0.7 if config.mesh.fsdp == -1 else 1.0
    needed *= 0.95 if config.optim.moments == "bfloat16" else 1.0
    return needed * config.batch_size / 16 / min(config.accumulation, 4)


def search(planned, available, *, need=memory, devices=16):
    """(attempts, the configs that were compiled)."""
    compiled = []

    def compile_with(config):
        compiled.append(config)
        if need(config) > available:
            raise DoesNotFitError(need(config), available)
        return planned, types.SimpleNamespace(hbm=need(config))

    lacking = DoesNotFitError(need(planned.config), available)
    return list(advice.search(planned, devices, compile_with, lacking=lacking)), compiled


@pytest.mark.parametrize(
    "available,fitting",
    [
        (75, SHARDED),
        (65, SHARDED | {"remat": "dots"}),
        (45, SHARDED | {"remat": "full"}),
        (25, SHARDED | {"remat": "full", "accumulation": 2}),
        (10.2, SHARDED | {"remat": "full", "accumulation": 4, "optim.moments": "bfloat16"}),
        (
            3,
            SHARDED
            | {
                "remat": "full",
                "accumulation": 4,
                "optim.moments": "bfloat16",
                "batch_size": 4,
            },
        ),
    ],
)
def test_changes_that_help_are_kept_until_the_run_fits(planned, available, fitting):
    attempts, configs = search(planned, available)
    assert attempts[-1].changes == fitting and attempts[-1].fit is not None
    assert not any(attempt.fit for attempt in attempts[:-1])
    assert [attempt.hbm for attempt in attempts] == [memory(config) for config in configs]


def test_each_attempt_adds_one_change_to_those_that_helped(planned):
    attempts, _ = search(planned, 3)
    kept = {}
    for attempt in attempts:
        new = attempt.changes.items() - kept.items()
        assert len({name.split(".")[0] for name, _ in new}) == 1
        assert kept.keys() <= attempt.changes.keys()
        kept = attempt.changes if attempt.kept else kept
    # An accumulation of 8 is no better than one of 4.
    assert [a.changes["accumulation"] for a in attempts if not a.kept] == [8]


def test_changes_that_do_not_help_are_dropped(planned):
    def need(config):
        return memory(config) * (2 if config.mesh.fsdp == -1 or config.remat == "dots" else 1)

    attempts, _ = search(planned, 55, need=need)
    assert [attempt.kept for attempt in attempts] == [False, False, True, True]
    assert attempts[-1].changes == {"remat": "full", "accumulation": 2}


def test_the_search_ends_if_nothing_is_enough(planned):
    attempts, _ = search(planned, 0.1)
    assert not any(attempt.fit for attempt in attempts)
    assert len(attempts) == 10
    assert attempts[-1].changes["batch_size"] == 2


def test_settings_that_are_refused_are_recorded_and_dropped(planned):
    def compile_with(config):
        if config.accumulation > 1:
            raise ConfigError("no")
        raise DoesNotFitError(memory(config), 1)

    attempts = list(advice.search(planned, 1, compile_with, lacking=DoesNotFitError(100, 1)))
    refused = [attempt for attempt in attempts if attempt.refused]
    assert [attempt.changes["accumulation"] for attempt in refused] == [2]
    assert not any(attempt.kept or attempt.hbm for attempt in refused)
    assert "accumulation" not in attempts[-1].changes
    # One device has nothing to shard over.
    assert not any("mesh.fsdp" in attempt.changes for attempt in attempts)


def test_what_the_config_has_already_is_not_tried(planned):
    changed = dataclasses.replace(
        planned, config=tiny.config(remat="full", **{"mesh.fsdp": 4, "optim.moments": "bfloat16"})
    )
    attempts, _ = search(changed, 0.1)
    names = {name for attempt in attempts for name in attempt.changes}
    assert names == {"accumulation", "batch_size"}


def test_temporaries_alone_are_not_compared_with_the_whole():
    alone = DoesNotFitError(20, 16, temporaries_only=True)
    assert advice._helped(alone, DoesNotFitError(22, 16))
    assert not advice._helped(DoesNotFitError(22, 16), alone)
    assert advice._helped(alone, DoesNotFitError(19, 16, temporaries_only=True))
    assert not advice._helped(alone, DoesNotFitError(19.9, 16, temporaries_only=True))


def test_attempts_are_shown_as_flags(planned):
    attempts, _ = search(planned, 45)
    lines = [table.attempt(attempt.to_json()) for attempt in attempts]
    sharded = "--config.mesh.data=1 --config.mesh.fsdp=-1"
    assert lines == [
        f"{sharded}: helps, 0.00 GiB per device",
        f"{sharded} --config.remat=dots: helps, 0.00 GiB per device",
        f"{sharded} --config.remat=full: fits, 0.00 GiB per device",
    ]
