"""The registry creates the task that a config selects."""

import pytest

from configs import base
from fd_jax.errors import ConfigError
from fd_jax.tasks import registry
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.segment import SegmentTask
from tests import tiny


def test_the_section_of_a_config_selects_its_task():
    specs = {registry.TEACHER: tiny.teacher_spec()}
    assert isinstance(registry.make(tiny.config(), specs), DistillTask)
    specs = {registry.INIT_FROM: tiny.teacher_spec()}
    assert isinstance(registry.make(tiny.fine_tuning(), specs), ClassifyTask)
    specs = {registry.INIT_FROM: tiny.teacher_spec(depth=3)}
    assert isinstance(registry.make(tiny.segmentation(), specs), SegmentTask)


def test_a_config_without_a_task_section_is_refused():
    config = tiny.config()
    del config.teacher
    with pytest.raises(
        ConfigError, match="neither a teacher nor a model nor a segment nor a contrast: no task"
    ):
        registry.make(config)


def test_networks_lists_what_a_run_reads_from_model_folders():
    config = tiny.config("somewhere", **{"target.kind": "logits"})
    assert registry.kind_of(config).networks(config) == [
        registry.Network(
            "teacher", "somewhere", source="tiny", field="teacher.source", needs_head=True
        )
    ]
    config = tiny.several([("a", base.teacher("x")), ("b", base.teacher("y", path="there"))])
    assert registry.kind_of(config).networks(config) == [
        registry.Network("teacher a", "teachers/x", source="x", field="teachers.a.source"),
        registry.Network("teacher b", "there", source="y", field="teachers.b.source"),
    ]
    config = tiny.fine_tuning("a/model")
    wanted = registry.Network("starts from", "a/model", source=None, optional=False)
    assert registry.kind_of(config).networks(config) == [wanted]
    config = tiny.segmentation("a/model")
    assert registry.kind_of(config).networks(config) == [wanted]


def test_each_kind_knows_the_elements_of_its_batches():
    elements = registry.kind_of(tiny.config()).elements(tiny.config())
    assert elements.keys() == {"image", "label", "weight", "index"}
    elements = registry.kind_of(tiny.segmentation()).elements(tiny.segmentation())
    assert elements.keys() == {"image", "mask", "weight", "index"}
    assert (elements["mask"].shape, elements["mask"].padding) == ((32, 32), 255)
