"""The registry creates the task that a config selects."""

import pytest

from fd_jax.errors import ConfigError
from fd_jax.tasks import registry
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from tests import tiny


def test_the_section_of_a_config_selects_its_task():
    specs = {registry.TEACHER: tiny.teacher_spec()}
    assert isinstance(registry.make(tiny.config(), specs), DistillTask)
    specs = {registry.INIT_FROM: tiny.teacher_spec()}
    assert isinstance(registry.make(tiny.fine_tuning(), specs), ClassifyTask)


def test_a_config_without_a_task_section_is_refused():
    config = tiny.config()
    del config.teacher
    with pytest.raises(ConfigError, match="neither a teacher nor a model nor a contrast: no task"):
        registry.make(config)


def test_networks_lists_what_a_run_reads_from_model_folders():
    config = tiny.config("somewhere", **{"target.kind": "logits"})
    assert registry.kind_of(config).networks(config) == [
        registry.Network("teacher", "somewhere", source="tiny", needs_head=True)
    ]
    config = tiny.fine_tuning("a/model")
    wanted = registry.Network("starts from", "a/model", source=None, optional=False)
    assert registry.kind_of(config).networks(config) == [wanted]
