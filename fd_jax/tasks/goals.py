"""What a student learns from all of its teachers, which run one after another."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fd_jax.cost.flops import Flops
from fd_jax.metrics import weighted
from fd_jax.tasks.goal import Goal, View
from fd_jax.tasks.sections import SINGLE_TEACHER
from fd_jax.tasks.stored import StoredTeacher
from fd_jax.typing import Batch, Metrics, PyTree

# Parts of the state that is not trained: what running normalisations have measured, and in how many
# steps.
STANDARDIZED, STEPS = "standardized", "steps"

ByTeacher = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Goals:
    """The goals of a run.

    Weights, projectors and state are nested under the teachers' names, except for those of a single
    teacher.

    Attributes:
      each: goal for each teacher by name; a single teacher is named `SINGLE_TEACHER`.
    """

    each: Mapping[str, Goal]

    @property
    def only(self) -> Goal:
        """The goal of a run with one teacher."""
        (goal,) = self.each.values()
        return goal

    @property
    def stored(self) -> list[str]:
        """The names of the teachers whose maps come with the batches."""
        return [n for n, goal in self.each.items() if isinstance(goal.teacher, StoredTeacher)]

    @property
    def of_held_out(self) -> bool:
        """Whether there are targets of held-out pictures."""
        teachers = (goal.teacher for goal in self.each.values())
        return all(each.held_out for each in teachers if isinstance(each, StoredTeacher))

    def init(self, keys: list[jax.Array]) -> PyTree:
        """Random initial parameters of the projectors, from one key for each teacher."""
        pairs = zip(self.each.items(), keys, strict=True)
        return nested({name: goal.init(key) for (name, goal), key in pairs})

    def init_state(self) -> PyTree:
        """What running normalisations know before the first step; {} if there are none."""
        if not self._running:
            return {}
        known = nested({name: goal.init_state() for name, goal in self._running.items()})
        return {STANDARDIZED: known, STEPS: jnp.zeros((), jnp.int32)}

    def load(self) -> PyTree:
        """All frozen arrays, see `Goal.load`."""
        return self._nested(lambda goal: goal.load())

    def abstract(self) -> PyTree:
        """Shapes and dtypes of `load`, without reading anything."""
        return self._nested(lambda goal: goal.abstract())

    def draws(self, rows: int, keys: list[jax.Array]) -> dict[str, jax.Array]:
        """Entries of a batch with random numbers for drop path, from one key for each teacher."""
        pairs = zip(self.each.items(), keys, strict=True)
        return {
            _drop_path_entry(name): jax.random.uniform(key, (rows, goal.teacher.depth, 2))
            for (name, goal), key in pairs
            if goal.teacher.drop_path
        }

    def tokens(
        self, frozen: PyTree, batch: Batch, grid: tuple[int, int] | None = None
    ) -> ByTeacher:
        """The tokens of each teacher that become its target, see `Goal.tokens`."""
        return {name: view.tokens for name, view in self.views(frozen, batch, grid).items()}

    def views(
        self,
        frozen: PyTree,
        batch: Batch,
        grid: tuple[int, int] | None = None,
        *,
        guide: str | None = None,
    ) -> dict[str, View]:
        """What is taken from each teacher, see `Goal.view`; `guide` is the one that attends.

        A teacher waits until the one before is done, so that their activations need the memory of
        the largest, and not that of all.
        """
        images, found, stored = batch["image"], dict[str, View](), self.stored
        for name, goal in self.each.items():
            if name in stored:
                continue
            if found:
                images, _ = jax.lax.optimization_barrier((images, found))
            drops = batch.get(_drop_path_entry(name))
            weights = part_of(frozen, name)
            found[name] = goal.view(weights, images, drops, grid=grid, attends=name == guide)
        for name in stored:
            weights = part_of(frozen, name)
            found[name] = View(self.each[name].stored_tokens(weights, batch, name, grid=grid))
        return {name: found[name] for name in self.each}

    def at(self, tokens: ByTeacher, visible: jax.Array | None) -> ByTeacher:
        """The tokens that a student with some patches predicts, see `Goal.at`; None for all."""
        if visible is None:
            return tokens
        return {name: goal.at(tokens[name], visible) for name, goal in self.each.items()}

    def measured(self, state: PyTree, tokens: ByTeacher, weight: jax.Array) -> PyTree:
        """The state after running normalisations have seen the tokens of one more step."""
        if not self._running:
            return state
        before, steps = state[STANDARDIZED], state[STEPS]
        after = {
            name: goal.measured(part_of(before, name), tokens[name], weight, steps)
            for name, goal in self._running.items()
        }
        return {**state, STANDARDIZED: nested(after), STEPS: steps + 1}

    def normalized(self, tokens: ByTeacher, frozen: PyTree, state: PyTree) -> ByTeacher:
        """The target from each teacher, see `Goal.normalized`."""
        return {
            name: self.normalized_one(name, tokens[name], part_of(frozen, name), state)
            for name in self.each
        }

    def normalized_one(
        self, name: str, tokens: jax.Array, weights: PyTree, state: PyTree
    ) -> jax.Array:
        """The target from one teacher; `weights` are its own frozen arrays."""
        known = part_of(state[STANDARDIZED], name) if name in self._running else {}
        return self.each[name].normalized(tokens, weights, known)

    def distances(self, predictions: ByTeacher, targets: ByTeacher) -> ByTeacher:
        """Weighted distance of each example for each teacher. -> [B] each"""
        return {
            name: goal.distance(predictions[name], targets[name])
            for name, goal in self.each.items()
        }

    def flops(
        self,
        image_size: int,
        grid: tuple[int, int] | None = None,
        *,
        patches: int | None = None,
        guide: str | None = None,
    ) -> list[Flops]:
        """FLOPs of each goal for one image whose side is `image_size` pixels, see `Goal.flops`."""
        return [
            goal.flops(image_size, grid, patches=patches, attends=name == guide)
            for name, goal in self.each.items()
        ]

    def check_grid(self, grid: tuple[int, int], image_size: int) -> None:
        """Refuses a size of training images that suits one of the goals not, see `Goal.check_grid`.

        Raises:
          ConfigError: a teacher and the student cannot be compared at this size.
        """
        for goal in self.each.values():
            goal.check_grid(grid, image_size)

    @property
    def _running(self) -> dict[str, Goal]:
        return {name: goal for name, goal in self.each.items() if goal.target.running}

    def _nested(self, of_goal: Callable[[Goal], Any]) -> PyTree:
        return nested({name: of_goal(goal) for name, goal in self.each.items()})


def metric_name(metric: str, teacher: str) -> str:
    """The name of a metric of one teacher, such as "loss/clip"; "loss" for a single teacher."""
    return f"{metric}/{teacher}" if teacher else metric


def by_teacher(metric: str, each: ByTeacher, weight: jax.Array) -> Metrics:
    """A metric of each of several teachers; {} for a single one. each: [B] by teacher."""
    return {metric_name(metric, n): weighted(value, weight) for n, value in each.items() if n}


def total(each: ByTeacher) -> jax.Array:
    """The sum over the teachers."""
    first, *others = each.values()
    return sum(others, first)


def nested(trees: dict[str, PyTree]) -> PyTree:
    """Nests the trees under the teachers' names; the tree of a single teacher is not nested."""
    return trees[SINGLE_TEACHER] if SINGLE_TEACHER in trees else trees


def part_of(tree: PyTree, name: str) -> PyTree:
    """The part of a tree from `nested` that belongs to one teacher."""
    return tree[name] if name else tree


def _drop_path_entry(name: str) -> str:
    """The name of the batch entry that holds a teacher's drop-path randomness."""
    return f"teacher_drops_{name}" if name else "teacher_drops"
