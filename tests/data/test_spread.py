"""Evenly spread examples against a list."""

import pytest

from fd_jax.data.datasets import spread as spread_over


class Letters:
    """A dataset whose examples are letters."""

    name, num_classes, class_names = "letters", 26, None

    def __len__(self):
        return 26

    def __getitem__(self, index):
        return "abcdefghijklmnopqrstuvwxyz"[index]

    def describe(self, index):
        return f"letter {self[index]}"


@pytest.mark.parametrize("count,expected", [(2, "an"), (4, "agnt"), (13, "acegikmoqsuwy")])
def test_examples_are_evenly_spread_over_the_whole_dataset(count, expected):
    chosen = spread_over(Letters(), count)
    assert "".join(chosen[i] for i in range(len(chosen))) == expected
    assert chosen.describe(1) == f"letter {expected[1]}"


def test_a_smaller_dataset_is_used_whole():
    chosen = spread_over(Letters(), 99)
    assert "".join(chosen[i] for i in range(len(chosen))) == "abcdefghijklmnopqrstuvwxyz"
