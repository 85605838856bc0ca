"""The target that a teacher sets: which of its features, on which grid, and how normalised."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models.features import FeatureMap
from fd_jax.normalization import kinds
from fd_jax.normalization.kinds import Constants

TargetKind = Literal["full", "cls", "gap", "logits"]
Resample = Literal["none", "bilinear", "student"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Which of the teacher's features is the target, and how it is normalised.

    See docs/reference.md#table-2, docs/reference.md#table-3 and docs/several_teachers.md.

    Attributes:
      kind: "full" is the whole map (the class token if both networks have one, and the patches),
        "cls" the class token, "gap" the mean patch token, "logits" the class distribution from the
        teacher's head. The student predicts logits from its class token, or from its mean patch
        token if it has no class token.
      normalize: normalisation of the tokens, a name in `kinds.KINDS`; unused for logits.
      after_norm: whether the teacher's final norm is applied first (docs/reference.md#after-norm).
      resample: what happens if the grids differ: "bilinear" resizes the teacher's patches to the
        student's grid before they are normalised, "student" resizes the student's patches to the
        teacher's grid before they are projected, and "none", as in the original, refuses.
      statistics: file of the teacher's statistics, for a fitted normalisation; "" for others.
      freeze_after: number of steps after which the statistics of a running normalisation stay.
      blocks: the teacher's blocks, counted from 0, after each of which its map is a target of its
        own; () for the map of the last one alone.

    Raises:
      ConfigError: a name is unknown, or a normalisation has no statistics, or too many.
    """

    kind: TargetKind
    normalize: kinds.Kind
    after_norm: bool
    resample: Resample = "none"
    statistics: str = ""
    freeze_after: int = 1000
    blocks: Sequence[int] = ()

    def __post_init__(self):
        check_choice("target.kind", self.kind, get_args(TargetKind))
        check_choice("target.normalize", self.normalize, get_args(kinds.Kind))
        check_choice("target.resample", self.resample, get_args(Resample))
        if self.fitted and not self.statistics:
            raise ConfigError(
                f"target.normalize={self.normalize!r} is fitted to the teacher's tokens: set "
                "target.statistics to the file that python -m fd_jax.target_stats wrote"
            )
        if self.statistics and not self.fitted:
            raise ConfigError(
                f"target.statistics={self.statistics!r}, but target.normalize="
                f"{self.normalize!r} reads none; set one of them differently"
            )

    @property
    def fitted(self) -> bool:
        """Whether the normalisation needs a file of statistics."""
        return self._constants == "fitted"

    @property
    def running(self) -> bool:
        """Whether a run measures the statistics of the normalisation itself."""
        return self._constants == "running"

    @property
    def _constants(self) -> str:
        return "none" if self.kind == "logits" else kinds.KINDS[self.normalize].constants

    def select(self, features: FeatureMap, *, cls: bool) -> jax.Array:
        """The tokens to compare. -> [B, T, D]; `cls`: whether both sides have a class token."""
        if self.kind == "gap":
            return jnp.mean(features.patches, axis=1, keepdims=True)
        if self.kind == "logits" and not features.cls:
            return jnp.mean(features.patches, axis=1, keepdims=True)
        if self.kind in ("cls", "logits"):
            return features.cls_token[:, None]
        return features.full if cls else features.patches

    def groups(self, *, cls: bool) -> dict[str, slice]:
        """Which of the selected tokens share statistics: class tokens are not like patches."""
        if self.kind != "full":
            return {self.kind: slice(None)}
        return {"cls": slice(0, 1), "patch": slice(1, None)} if cls else {"patch": slice(None)}

    def normalized(
        self, tokens: jax.Array, constants: Mapping[str, Constants], *, cls: bool
    ) -> jax.Array:
        """The selected tokens, normalised. [B, T, D] -> [B, T, D] float32

        Args:
          tokens: result of `select`.
          constants: of each group of tokens; not read if the normalisation has none.
          cls: whether both sides have a class token.
        """
        apply = kinds.KINDS[self.normalize].apply
        if self._constants == "none":
            return apply(tokens, {})
        parts = [
            apply(tokens[:, at], constants[group]) for group, at in self.groups(cls=cls).items()
        ]
        return jnp.concatenate(parts, axis=1)

    def measured(
        self,
        before: Mapping[str, Constants],
        tokens: jax.Array,
        weight: jax.Array,
        *,
        steps: jax.Array,
        cls: bool,
    ) -> dict[str, Constants]:
        """The constants of a running normalisation after one more step.

        Args:
          before: those of the steps before, by group.
          tokens: selected tokens of the whole global batch. [B, T, D]
          weight: 1 for an image, 0 for padding. [B]
          steps: number of steps before, int32 scalar.
          cls: whether both sides have a class token.
        """
        still = steps < self.freeze_after
        return {
            group: jax.tree.map(
                lambda new, old: jnp.where(still, new, old),
                kinds.measured_constants(before[group], tokens[:, at], weight, steps),
                dict(before[group]),
            )
            for group, at in self.groups(cls=cls).items()
        }
