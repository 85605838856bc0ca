"""Evenly spread examples against a list."""

import pytest

from fd_jax.data.spread import Spread


class Letters:
    """A dataset whose examples are letters."""

    name, num_classes = "letters", 26

    def __len__(self):
        return 26

    def __getitem__(self, index):
        return "abcdefghijklmnopqrstuvwxyz"[index]

    def describe(self, index):
        return f"letter {self[index]}"


@pytest.mark.parametrize("count,expected", [(2, "an"), (4, "agnt"), (13, "acegikmoqsuwy")])
def test_examples_are_evenly_spread_over_the_whole_dataset(count, expected):
    spread = Spread(Letters(), count)
    assert "".join(spread[i] for i in range(len(spread))) == expected
    assert spread.describe(1) == f"letter {expected[1]}"


def test_a_smaller_dataset_is_used_whole():
    spread = Spread(Letters(), 99)
    assert "".join(spread[i] for i in range(len(spread))) == "abcdefghijklmnopqrstuvwxyz"
