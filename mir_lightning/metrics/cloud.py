"""The tokens of one layer and modality: norms of all, moments of most, the others held until they are known.

Two outlier rules decide which tokens count, and both need the norms of all tokens. So the norm of every token is
kept; raw tokens while they take less room than a covariance; after that, only those whose norm is unusual so far,
which an outlier rule may yet exclude. The others go into moments, one for each class of tokens that some rule
keeps. That what was accumulated is of the class it was taken for is checked at the end.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mir_lightning.functional.frechet import Gaussian
from mir_lightning.functional.mir import (
    BOTH,
    KEPT,
    NEITHER,
    PAPER_ONLY,
    ROBUST_ONLY,
    OutlierRules,
    Rule,
    check_count,
    judge,
    kept_by,
    norms_of,
)
from mir_lightning.metrics.moments import (
    Moments,
    mean_and_covariance,
    merge_moments,
    moments_of,
    no_moments,
    packed_size,
    reduce_moments,
    update_moments,
)

Gather = Callable[..., list[Tensor]]

_PARTS = (BOTH, PAPER_ONLY, ROBUST_ONLY)  # classes whose tokens are accumulated, each apart
_DTYPES = (torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of no tokens, and of tokens
_SURE = 2.5 / 3  # of a margin: tokens within it so far are hardly outliers in the end
_USUAL = 1.5 / 3  # of a margin: what is accumulated while there is room to hold the others and learn more
_PRESSED = 0.75  # of what is held without being sure stays so when room is short
_GROWTH = 1.125  # of the number of tokens seen, until their norms are judged anew
_LEAST_ROOM = 2**20  # bytes of raw tokens kept before judging any: enough for steady statistics
_LEAST_HELD = 2**21  # bytes of room for tokens that are not sure: a third of many may be massive


class AccumulatedOutlierError(ValueError):
    """Tokens that a final outlier rule excludes were accumulated earlier in the stream, or the reverse."""


class Judged(NamedTuple):
    """A cloud whose outliers are known."""

    norms: Tensor  # of all its tokens
    classes: Tensor  # of all its tokens
    rows: Tensor  # the held tokens
    row_classes: Tensor

    def excluded(self, rule: Rule) -> int:
        """Number of tokens that a rule does not keep."""
        return int((~kept_by(rule, self.classes)).sum())

    def rules_differ(self) -> bool:
        """Whether the two rules keep different tokens."""
        return bool(((self.classes == PAPER_ONLY) | (self.classes == ROBUST_ONLY)).any())


class Batch(NamedTuple):
    """Tokens of an update, and the classes to accumulate them as; those of class ``NEITHER`` are not."""

    tokens: Tensor  # [n, d]
    norms: Tensor  # of these, after those of all held tokens where these are sorted too
    classes: Tensor  # of the norms, uint8
    rules: OutlierRules | None  # that sorted them; none where all are held, and in a second pass
    final: bool = False  # a second pass: norms are known, and tokens that no rule keeps are not held

    @classmethod
    def held(cls, tokens: Tensor, norms: Tensor) -> "Batch":
        """All tokens are held."""
        return cls(tokens, norms, torch.full_like(norms, NEITHER, dtype=torch.uint8), None)


@dataclass(frozen=True)
class Cloud:
    """Tokens of one layer and modality, as states of a metric; the methods change the lists in place."""

    width: int
    accumulator: torch.dtype  # of the covariances
    products: torch.dtype  # of tokens, that covariances are sums of
    home: torch.device  # where it is while there are no tokens
    rows: list[Tensor]  # held tokens, [n, d] each
    norms: list[Tensor]  # of the tokens that are not held, float64 [n] each
    classes: list[Tensor]  # of the same tokens, uint8 [n] each
    moments: list[Tensor]  # head and packed M2 of each class that some rule keeps, once a token is accumulated
    bounds: list[Tensor]  # the outlier rules that the norms set when they were last judged, float64 [3]

    STATES = ("rows", "norms", "classes", "moments", "bounds")

    def device(self, default: torch.device | None = None) -> torch.device:
        """Where the tokens were, or the ``default`` without any."""
        states = (self.rows, self.norms, self.moments)
        return next((t.device for state in states for t in state), default or self.home)

    def held(self) -> Tensor:
        """All held tokens, ``[n, d]``."""
        return torch.cat(self.rows) if self.rows else torch.zeros(0, self.width, device=self.device())

    def seen_norms(self) -> Tensor:
        """Norms of all tokens, ``[n]``, the held ones last."""
        return torch.cat([self._accumulated()[0], norms_of(self.held())])

    def _accumulated(self) -> tuple[Tensor, Tensor]:
        """Norms and classes of the tokens that are not held."""
        nothing = torch.zeros(0, device=self.device())
        return torch.cat([nothing.double(), *self.norms]), torch.cat([nothing.byte(), *self.classes])

    def sort(self, tokens: Tensor, norms: Tensor, known: OutlierRules | None) -> Batch:
        """How tokens ``[n, d]`` would be added; ``known`` are the final rules, in a second pass."""
        if known is not None:
            return Batch(tokens, norms, known.classes(norms), None, final=True)
        if not self.moments:
            if _bytes_of(self.rows) + tokens.nbytes <= self._room():
                return Batch.held(tokens, norms)
            norms = torch.cat([norms_of(self.held()), norms])
        rules = self._rules(norms)
        return Batch(tokens, norms, _held_unless(rules.offsets(norms) <= _USUAL * rules.margin, BOTH), rules)

    def add(self, batch: Batch, counts: Sequence[int]) -> None:
        """Add a batch as it was sorted, with so many tokens of each class."""
        tokens, rules = batch.tokens, batch.rules
        if rules is None:
            for part, where in _by_class(batch.classes, counts):
                if part != NEITHER:
                    self._accumulate(part, _chosen(tokens, where))
                elif not batch.final:
                    self.rows.append(tokens.clone())
            return
        if len(batch.norms) > len(tokens):
            tokens = torch.cat([*self.rows, tokens])
            self.rows.clear()
        self.bounds[:] = [torch.stack(rules)]
        self._release(tokens, batch.norms, batch.classes, counts)
        room = max(self._room() // 2, _LEAST_HELD)
        for pressed in (False, True):
            if _bytes_of(self.rows) > room:
                self._make_room(rules, room, pressed)

    def _room(self) -> int:
        """Bytes of raw tokens that are kept before any are judged."""
        return max(packed_size(self.width) * self.accumulator.itemsize, _LEAST_ROOM)

    def _rules(self, norms: Tensor) -> OutlierRules:
        """The outlier rules of all norms seen, those given among them, or of a little fewer.

        All are judged when their number has grown by a fixed factor, so an update's share of that does not grow.
        """
        if not self.moments:
            return judge(norms)
        seen = sum(map(len, (*self.norms, *self.rows)))
        if not self.bounds or _level(seen) < _level(seen + len(norms)):
            return judge(torch.cat([self.seen_norms(), norms]))
        return OutlierRules(*self.bounds[0])

    def _make_room(self, rules: OutlierRules, room: int, pressed: bool) -> None:
        """Release held tokens, where they take more than ``room`` bytes.

        The sure inliers, and the surely massive, far outside the robust rule and well inside the paper's;
        ``pressed``, also that quarter of the others that is furthest from any margin. Never a token that neither
        rule keeps among those last judged.
        """
        rows = self.held()
        norms = norms_of(rows)
        offsets, classes = rules.offsets(norms), rules.classes(norms)
        sure = (offsets <= _SURE * rules.margin) | (
            (offsets > 2 * rules.robust) & (offsets <= _SURE * rules.paper)
        )
        if pressed:
            leeway = torch.minimum((offsets / rules.robust - 1).abs(), (offsets / rules.paper - 1).abs())
            leeway = leeway.masked_fill(classes == NEITHER, torch.nan)
            sure |= leeway >= leeway.nanquantile(_PRESSED)
        classes = _held_unless(sure, classes)
        counts = counts_of(classes).tolist()
        for part, moments in enumerate(self._parts()):
            if moments is None and counts[part] * rows[:1].nbytes < room:
                classes = classes.masked_fill(classes == part, NEITHER)  # less to hold than moments of their own
                counts[part], counts[NEITHER] = 0, counts[NEITHER] + counts[part]
        self.rows.clear()
        self._release(rows, norms, classes, counts)

    def _release(self, tokens: Tensor, norms: Tensor, classes: Tensor, counts: Sequence[int]) -> None:
        """Accumulate tokens by class; hold back those of class ``NEITHER``."""
        for part, where in _by_class(classes, counts):
            if part == NEITHER:
                _append(self.rows, tokens[where])
            else:
                self._accumulate(part, _chosen(tokens, where))
                _append(self.norms, norms[where])
                _append(self.classes, classes[where])

    def _accumulate(self, part: int, tokens: Tensor) -> None:
        """Add tokens to the moments of their class."""
        moments = self._parts()
        if (known := moments[part]) is not None:
            update_moments(known, tokens, self.products)
        else:
            moments[part] = moments_of(tokens, self.accumulator, self.products)
            self._keep(moments)

    def _parts(self) -> list[Moments | None]:
        """Moments of each class; ``None`` for one without tokens."""
        pairs = zip(self.moments[::2], self.moments[1::2], strict=True)
        return [Moments(*pair) if len(pair[0]) else None for pair in pairs] or [None] * len(_PARTS)

    def _keep(self, parts: Sequence[Moments | None]) -> None:
        """Moments of the classes as a state: two tensors each, empty ones for a class without tokens."""
        device = next((part.head.device for part in parts if part is not None), None)
        nothing = (torch.zeros(0, device=device), torch.zeros(0, device=device))
        self.moments[:] = [tensor for part in parts for tensor in part or nothing] if any(parts) else []

    def judged(self, modality: str, layer: int) -> Judged:
        """The tokens with their final classes.

        Raises:
            ValueError: with fewer than two tokens.
            AccumulatedOutlierError: if some were accumulated as another class than they turn out to be of.
        """
        (known, filed), rows, norms = self._accumulated(), self.held(), self.seen_norms()
        check_count(modality, len(norms), layer)
        rules = judge(norms)
        if wrong := int((rules.classes(known) != filed).sum()):
            raise AccumulatedOutlierError(
                f"{wrong} {modality} tokens of layer {layer} looked usual (or massive) when they were accumulated "
                "and do not among all tokens seen: call start_second_pass() and repeat the same updates, or "
                "shuffle the stream."
            )
        row_classes = rules.classes(norms[len(known) :])
        return Judged(norms, torch.cat([filed, row_classes]), rows, row_classes)

    def gaussian(self, judged: Judged, rule: Rule) -> Gaussian:
        """Of the tokens that a rule keeps."""
        rows, parts = judged.rows[kept_by(rule, judged.row_classes)], self._parts()
        moments = reduce(_union, [parts[c] for c in KEPT[rule]])
        if moments is None:
            return Gaussian.from_tokens(rows)
        eps = max(torch.finfo(dtype).eps for dtype in (self.accumulator, self.products))
        return Gaussian(*mean_and_covariance(self._with(moments, rows)), eps=eps)

    def start_second_pass(self, rules: OutlierRules) -> None:
        """Keep the norms, classed by the final ``rules``, and forget the tokens."""
        norms = self.seen_norms()
        self.norms[:], self.classes[:] = [norms], [rules.classes(norms)]
        for state in (self.rows, self.moments, self.bounds):
            state.clear()

    def merge(self, other: "Cloud") -> None:
        """Take in another stream's tokens; ``other`` does not change, and the two share no moments."""
        for state in ("rows", "norms", "classes"):
            getattr(self, state)[:0] = getattr(other, state)
        self.bounds.clear()
        self._keep([_union(*pair) for pair in zip(other._parts(), self._parts(), strict=True)])
        self.moments[:] = [tensor.clone() for tensor in self.moments]

    def sync(self, gather: Gather, owner: int | None, group: Any) -> None:
        """Merge across ranks: norms are gathered, moments summed, on one rank or, without ``owner``, on all.

        The norms of all ranks decide the classes of the held tokens, so each rank adds its own to the moments.
        """
        rows = self.held()
        row_norms = norms_of(rows)
        known, filed, open_norms = (
            torch.cat(gather(tensor, group=group)) for tensor in (*self._accumulated(), row_norms)
        )
        seen = torch.cat([known, open_norms])
        classes, parts = filed.new_zeros(len(seen)), self._parts()
        if len(seen) >= 2:
            rules = judge(seen)
            classes, row_classes = torch.cat([filed, rules.classes(open_norms)]), rules.classes(row_norms)
            for part in _PARTS:
                if (classes == part).any():
                    own = parts[part] or no_moments(self.width, self.accumulator, seen.device)
                    parts[part] = reduce_moments(self._with(own, rows[row_classes == part]), owner, group)
        self.norms[:], self.classes[:] = [seen], [classes]
        self.rows.clear()
        self._keep(parts)

    def _with(self, moments: Moments, rows: Tensor) -> Moments:
        """Moments with held tokens of their class; the argument does not change."""
        return merge_moments(moments, moments_of(rows, self.accumulator, self.products)) if len(rows) else moments


def gather_rows(clouds: Sequence[Cloud], gather: Gather, group: Any) -> None:
    """Give each cloud the held tokens of all ranks, in the narrowest dtype that holds what they came in."""
    dtypes = [reduce(torch.promote_types, (rows.dtype for rows in c.rows), torch.bool) for c in clouds]
    codes = torch.tensor([_DTYPES.index(dtype) for dtype in dtypes], device=clouds[0].device())
    for cloud, of_ranks in zip(clouds, torch.stack(gather(codes, group=group), dim=1).tolist(), strict=True):
        dtype = reduce(torch.promote_types, (_DTYPES[code] for code in of_ranks))
        cloud.rows[:] = [rows for rows in gather(cloud.held().to(dtype), group=group) if len(rows)]


def counts_of(classes: Tensor) -> Tensor:
    """Number of tokens of each class, ``[4]``, on their device."""
    return (classes[:, None] == torch.arange(4, device=classes.device)).sum(dim=0)


def _by_class(classes: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Each class that has tokens, and which these are; counts known, nothing waits for the device."""
    places = classes.argsort(stable=True).split(list(counts))
    return ((part, where) for part, where in enumerate(places) if len(where))


def _chosen(tokens: Tensor, where: Tensor) -> Tensor:
    return tokens if len(where) == len(tokens) else tokens[where]


def _held_unless(sure: Tensor, classes: Tensor | int) -> Tensor:
    """The classes of tokens that are sure, ``NEITHER`` for the others."""
    return torch.where(sure, classes, NEITHER).byte()


def _append(parts: list[Tensor], new: Tensor) -> None:
    """Add tensor to the end of a list that stays short: each is more than twice as long as the next."""
    while parts and len(parts[-1]) <= 2 * len(new):
        new = torch.cat([parts.pop(), new])
    parts.append(new)


def _level(count: int) -> int:
    return int(math.log(count, _GROWTH))


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _union(first: Moments | None, second: Moments | None) -> Moments | None:
    """Moments of two sets of tokens together."""
    return merge_moments(first, second) if first is not None and second is not None else first or second
