"""How many nodes the next step may verify, so that drafting pays, and costs next to nothing where it does not.

Two things are measured: the seconds of a step by its number of nodes, and the tokens that it commits. What is not
known is tried, and two accounts bound what the trying may cost. Nothing here is random and nothing reads a clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from statistics import median

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
"""Sizes that are offered: few, since an engine may prepare itself anew for each."""

LIMIT = 0.025
"""Seconds that drafting may lose, of those that plain steps would take; the promise is 0.03, noise has the rest."""

TRIALS = 0.02
"""Seconds that trials may lose against the best known size, of all seconds; errors about the best have the rest."""

HORIZON = 64
"""Plain steps whose part in these is granted in advance, since nothing can be tried for nothing."""

SLOPE = 0.125
"""Cost of a further node as a part of a plain step, until two sizes are measured."""

SAMPLES = 9
"""Steps whose median is the cost of a size: a step that was disturbed says nothing."""

STALE = 256
"""Steps after which a cost no longer counts."""

REFRESH = 64
"""Steps after which a plain one is taken to see what it costs by now."""

SURPRISE = 1.15
"""Factor between the last plain step and the median of them, from which on another one is taken soon."""

MEMORY = 0.95
"""What weight an observation has left, in the mean of its size, after the next one of that size."""

FADING = 0.98
"""The same after a step of a smaller size, which says nothing of this one."""

PATIENCE = 0.995
"""The same after any step, in the count of observations that stand against a hope."""

SLACK = 1.5
"""How many times as many tokens per node as the last size brings, the next one is believed to bring."""

PRIOR = 2
"""Observations after which those of a size weigh as much as what is believed of it."""

HOPE = 4
"""Observations after which those of a size weigh as much as what is hoped of it."""

MARGIN = 1.05
"""How many times the rate of the best known size another one must promise to be tried."""


class Pace:
    """The sizes of the steps of one text, or of several that step together.

    Args:
        limit: most nodes of a step, the anchor counted.
    """

    def __init__(self, limit: int = BUCKETS[-1]) -> None:
        self.buckets = [*(bucket for bucket in BUCKETS if bucket < limit), min(limit, BUCKETS[-1])]
        self._samples: list[deque[tuple[int, float]]] = [deque(maxlen=SAMPLES) for _ in self.buckets]
        self._weights = [0.0] * len(self.buckets)
        self._tokens = [0.0] * len(self.buckets)
        self._rises = [0.0] * len(self.buckets)
        self._counts = [0.0] * len(self.buckets)
        self._warm: set[tuple[str, int]] = set()
        self._step = 0
        self._spent = self._plain = self._tried = 0.0
        # Of the step under way: what was offered, the rate of the best known size if it is a trial, what came of it.
        self._offered: int | None = None
        self._rate: float | None = None
        self._took: float | None = None
        self._gained: list[int] = []

    def offer(self) -> int:
        """The budget of the next step, one of ``buckets``, the anchor counted; 1 is a plain step.

        The same one is offered until ``took`` says that the step is done.
        """
        if self._took is not None:
            self._close()
        if self._offered is None:
            self._offered = self.buckets[self._chosen()]
        return self._offered

    def took(self, nodes: int, seconds: float) -> None:
        """Say what a step cost, once per step.

        Args:
            nodes: of the tree that was verified, the anchor counted, which may be fewer than were offered.
            seconds: from the offer to the commit, with the drafting, which plain decoding has not.
        """
        if self._took is not None:
            self._close()
        seconds = max(seconds, 1e-9)  # a clock may be too coarse to see a step
        self._step += 1
        self._took = seconds
        bucket = self._bucket(nodes)
        new = {("size", bucket), ("drafted", self._offered != 1)} - self._warm
        if not new:
            self._samples[bucket].append((self._step, seconds))
        else:
            # engine and drafter prepare themselves once in their life: that says nothing of a step
            self._warm |= new
            self._took = 0.0

    def gained(self, nodes: int, path: Sequence[int]) -> None:
        """Say what a step brought to a text: the accepted nodes, in order, to which the model adds one token.

        What smaller trees would have brought is read off them, since a part of a tree accepts a part of its path.
        """
        bucket = self._bucket(nodes)
        self._gained.append(1 + len(path))
        below = 0
        for i, size in enumerate(self.buckets):
            told = float(i <= bucket)
            keep = MEMORY if told else FADING
            reached = 1 + bisect_left(path, size)
            self._weights[i] = keep * self._weights[i] + told
            self._tokens[i] = keep * self._tokens[i] + told * reached
            self._rises[i] = keep * self._rises[i] + told * (reached - below)
            self._counts[i] = PATIENCE * self._counts[i] + (i == bucket)
            below = reached

    def _close(self) -> None:
        """Enter the last step in the accounts, and forget it."""
        if self._took:
            self._book(self._took, sum(self._gained) / max(len(self._gained), 1))
        self._offered = self._rate = self._took = None
        self._gained = []

    def _book(self, seconds: float, tokens: float) -> None:
        self._spent += seconds
        # a plain step is what it is compared with: one that was disturbed is no loss
        measured = self._samples[0] and self._offered != 1
        self._plain += tokens * (self._costs()[0] if measured else seconds)
        if self._rate is not None:
            self._tried = max(0.0, self._tried + seconds - tokens / self._rate)

    def _chosen(self) -> int:
        """The best known size, or another one that promises more than it may lose."""
        if len(self._samples[0]) < 3:
            return 0
        cost = self._costs()
        gain, hope = self._gains()
        saved = LIMIT * max(self._plain, HORIZON * cost[0]) - (self._spent - self._plain)
        sizes = [i for i in range(self._frontier() + 1) if not i or cost[i] - cost[0] <= saved]
        best = max((i for i in sizes if not i or self._weights[i]), key=lambda i: gain[i] / cost[i])
        rate = gain[best] / cost[best]
        saved = TRIALS * max(self._spent, HORIZON * cost[0]) - self._tried
        free = [i for i in sizes if cost[i] - gain[i] / rate <= saved]
        if best and self._outdated() and 0 in free:
            trial = 0
        else:
            trial = max(free, key=lambda i: hope[i] / cost[i], default=best)
            if hope[trial] / cost[trial] <= MARGIN * rate:
                return best
        self._rate = rate
        return trial

    def _costs(self) -> list[float]:
        """Seconds of a step of each size: measured, or on the line between or beyond those that are."""
        known = {
            size: median(seconds for _, seconds in samples)
            for size, samples in zip(self.buckets, self._samples, strict=True)
            if samples and (size == 1 or samples[-1][0] > self._step - STALE)
        }
        last = max(known)
        slope = (known[last] - known[1]) / (last - 1) if last > 1 else SLOPE * known[1]
        costs, below = [], 1
        for size in self.buckets:
            if size in known:
                below = size
                costs.append(known[size])
                continue
            above = next((other for other in known if other > size), None)
            rise = max(slope, 0.0) if above is None else (known[above] - known[below]) / (above - below)
            costs.append(known[below] + rise * (size - below))
        return costs

    def _gains(self) -> tuple[list[float], list[float]]:
        """Tokens per step of each size, as known and as hoped for: the next nodes are not better than the last ones."""
        gain, hope, sizes, slope = [1.0], [1.0], self.buckets, 1.0
        for i in range(1, len(sizes)):
            wider = sizes[i] - sizes[i - 1]
            most = gain[i - 1] + slope * wider
            least = gain[i - 1] if i == 1 else (gain[i - 1] + most) / 2
            known = (self._tokens[i] + PRIOR * least) / (self._weights[i] + PRIOR)
            gain.append(min(known, gain[i - 1] + SLACK * slope * wider))
            hope.append((self._counts[i] * gain[i] + HOPE * most) / (self._counts[i] + HOPE))
            slope = (self._rises[i] + slope * wider) / (self._weights[i] + 1) / wider
        return gain, hope

    def _frontier(self) -> int:
        """The size after the largest that was measured: a cost is not guessed far beyond what is known."""
        return min(1 + max(i for i, samples in enumerate(self._samples) if samples), len(self.buckets) - 1)

    def _outdated(self) -> bool:
        """Whether the cost of a plain step was measured long ago, or has just changed."""
        samples = self._samples[0]
        usual, last = median(seconds for _, seconds in samples), samples[-1][1]
        return self._step - samples[-1][0] >= REFRESH or max(last / usual, usual / last) > SURPRISE

    def _bucket(self, nodes: int) -> int:
        return min(bisect_left(self.buckets, nodes), len(self.buckets) - 1)
