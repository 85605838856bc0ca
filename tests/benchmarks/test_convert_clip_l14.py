"""The figures of an import's cost ask for networks that the import takes."""

import pytest

from benchmarks import convert_clip_l14
from fd_jax.convert import facts


@pytest.mark.parametrize("style", convert_clip_l14.STYLES)
def test_what_the_bench_states_is_what_the_import_takes(style):
    stated = {claim.fact: claim.value for claim in facts.stated(convert_clip_l14.facts(style))}
    assert stated["mean"] == [0.5, 0.5, 0.5]
    architecture = convert_clip_l14.STYLES[style]
    named = stated.keys() & architecture.keys()
    assert named
    assert {name: stated[name] for name in named} == {name: architecture[name] for name in named}
