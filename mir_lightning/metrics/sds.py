"""Soft Discrimination Score by task and ability, as a torchmetrics Metric."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from mir_lightning.functional.sds import right_shares, soft_discrimination_score
from mir_lightning.metrics.base import PreciseMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNNAMED = "items"


class Discrimination(NamedTuple):
    """What is known of a task, an ability, or all items."""

    sds: float  # Soft Discrimination Score
    accuracy: float  # share of items whose right answer scores best
    chance: float  # what both are where candidates cannot be told apart: one over their number, averaged like them
    items: int


class SoftDiscriminationScore(PreciseMetric):
    """Soft Discrimination Score (SDS) and accuracy of multiple-choice items; higher is better.

    Source: RADAR (arXiv 2602.12892). Per task it is the mean over the items of the probability of the right
    answer, see :func:`~mir_lightning.functional.soft_discrimination_score`; per ability the mean over its tasks.
    A task may have parts, named ``"task/part"``: the task is then the mean over its parts.

    Args:
        tasks: the ability that each task belongs to; tasks without items so far are left out of the means. All
            ranks need the same. ``None``: the items belong to no task.
        kwargs: as every torchmetrics Metric takes them.

    Raises:
        ValueError: for an empty name in ``tasks``, or one that is also the whole of parts.

    Example:
        >>> import torch
        >>> metric = SoftDiscriminationScore({"colour": "perception", "relation": "reasoning"})
        >>> metric.update([torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0, 3.0])], task="colour")
        >>> metric.update([torch.tensor([0.5, 0.5])], task="relation")
        >>> round(metric.compute().item(), 3)
        0.498
        >>> metric.compute_breakdown()["reasoning/relation"]
        Discrimination(sds=0.5, accuracy=0.5, chance=0.5, items=1)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    sums: Tensor

    def __init__(self, tasks: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = dict(tasks) if tasks else {}
        for task, ability in self.tasks.items():
            if not task or not ability:
                raise ValueError(f"tasks must map names to abilities, got {task!r}: {ability!r}.")
            if any(other.startswith(f"{task}/") for other in self.tasks):
                raise ValueError(f"tasks: {task!r} has parts ({task}/...) and cannot have items of its own.")
        self._names = list(self.tasks) or [_UNNAMED]
        zeros = torch.zeros(len(self._names), 4, dtype=torch.float64)  # probability, right, chance, items
        self._merged: Tensor | None = None  # of all ranks, as compute() last saw it
        self.add_state("sums", default=zeros, dist_reduce_fx="sum")

    def update(self, scores: Sequence[Tensor], task: str | None = None) -> None:
        """Add items of one task.

        Args:
            scores: one tensor ``[candidates]`` an item, the right answer first.
            task: one of ``tasks``; ``None`` for a metric without tasks.

        Raises:
            TypeError: for scores that are not floating point tensors.
            ValueError: for scores of other shapes, not finite, or no items; for a task that is not one of
                ``tasks``. Nothing has been added then.
        """
        name = task if self.tasks else (task or _UNNAMED)
        if name not in self._names:
            known = ", ".join(self.tasks) or "none: the metric was made without tasks"
            raise ValueError(f"task must be one of those given to the metric ({known}), got {task!r}.")
        chances = torch.tensor([1 / len(s) for s in scores], dtype=torch.float64)
        rows = [soft_discrimination_score(scores, "none"), right_shares(scores), chances, torch.ones(len(chances))]
        added = torch.stack([row.detach().double().to(self.sums.device).sum() for row in rows])
        self.sums = self.sums.index_add(
            0, torch.tensor([self._names.index(name)], device=added.device), added[None]
        )

    def compute(self) -> Tensor:
        """Mean over all items of the probability of the right answer, a float64 scalar.

        Raises:
            ValueError: without any item.
        """
        total = self.sums.sum(dim=0)
        if total[3] == 0:
            raise ValueError("no item has been added: call update with the scores of at least one.")
        self._merged = self.sums
        return total[0] / total[3]

    def compute_breakdown(self) -> dict[str, Discrimination]:
        """All items (key ``""``), each ability, and each task (``"ability/task"``) that has items."""
        self.compute()
        assert self._merged is not None
        sums = self._merged.cpu()
        whole = sums.sum(dim=0)
        found = {"": _discrimination(whole[:3] / whole[3], whole[3])}
        if self.tasks:
            leaves = {f"{self.tasks[n]}/{n}": row for n, row in zip(self._names, sums, strict=True) if row[3]}
            for ability in dict.fromkeys(self.tasks.values()):
                found |= _branch(
                    ability, {path: row for path, row in leaves.items() if path.startswith(f"{ability}/")}
                )
        return found

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add another metric's items to this one's.

        Raises:
            ValueError: for a metric of other tasks.
        """
        if isinstance(incoming_state, SoftDiscriminationScore) and incoming_state.tasks != self.tasks:
            raise ValueError(f"tasks of the metrics differ: {self.tasks} and {incoming_state.tasks}.")
        super().merge_state(incoming_state)

    def _draw(self, ax: "Axes") -> None:
        found = self.compute_breakdown()
        names = [name or "all" for name in found]
        ax.barh(names, [score.sds for score in found.values()], label="SDS")
        ax.plot([score.chance for score in found.values()], names, "k|", markersize=12, label="chance")
        ax.invert_yaxis()
        ax.set(xlabel="Soft Discrimination Score", xlim=(0, 1))


def _branch(path: str, leaves: Mapping[str, Tensor]) -> dict[str, Discrimination]:
    """A node and all below it: a leaf is the mean over its items, another node the mean over its children."""
    if not leaves:
        return {}
    if path in leaves:
        return {path: _discrimination(leaves[path][:3] / leaves[path][3], leaves[path][3])}
    children = dict.fromkeys("/".join(leaf.split("/")[: path.count("/") + 2]) for leaf in leaves)
    below: dict[str, Discrimination] = {}
    for child in children:
        below |= _branch(child, {leaf: row for leaf, row in leaves.items() if f"{leaf}/".startswith(f"{child}/")})
    own = torch.tensor([below[child] for child in children], dtype=torch.float64)
    return {path: _discrimination(own[:, :3].mean(dim=0), own[:, 3].sum()), **below}


def _discrimination(means: Tensor, items: Tensor) -> Discrimination:
    sds, accuracy, chance = means.tolist()
    return Discrimination(sds, accuracy, chance, int(items))
