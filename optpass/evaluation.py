"""On what quality is judged, resolved once: by optimize, verify, gate and bisect alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from optpass import metrics, similarity
from optpass.errors import OptpassError
from optpass.results import Metric
from optpass.runtime.check import Reference
from optpass.runtime.denoise import Denoiser
from optpass.runtime.session import Session

Arrays = Mapping[str, NDArray[Any]]
Open = Callable[[], Session]


@dataclass(frozen=True)
class Evaluation:
    """What quality is judged by: labelled data and a metric, or agreement with the dense engine.

    Attributes:
        data: arrays by name, one row per sample; None where there are none.
        metric: one of ``metrics.METRICS``; None where there are no labels.
    """

    data: Arrays | None
    metric: str | None

    @classmethod
    def of(cls, source: Any, data: Any, metric: str | None, samples: int | None) -> Evaluation:
        """From what the user gave; a zoo model brings its own data and metric.

        Raises:
            OptpassError: a metric without data, or data that cannot be read.
        """
        if data is None and isinstance(source, str):
            from optpass.zoo import registry as zoo

            if source in zoo.names():
                entry = zoo.load(source)
                return cls(entry.test_split(samples), metric or entry.METRIC)
        if data is None:
            if metric is not None:
                raise OptpassError("data", f"metric {metric} is asked for without data", "give --data")
            return cls(None, None)
        found = metrics.load_data(data)
        if metric is not None:
            metrics.metric(metric)
        if samples is not None:
            found = {name: array[:samples] for name, array in found.items()}
        if metric is None and metrics.LABELS in found:
            metric = "top1"
        return cls(found, metric)

    def apart(self, count: int) -> tuple[Evaluation, Arrays | None]:
        """What is left to judge by when ``count`` samples, at most half, are set apart to calibrate on, and those."""
        total = len(next(iter(self.data.values()))) if self.data else 0
        count = min(count, total // 2)
        if self.data is None or not count:
            return self, None
        judged = {name: array[:-count] for name, array in self.data.items()}
        return replace(self, data=judged), {name: array[-count:] for name, array in self.data.items()}

    def check(self, inputs: Iterable[str]) -> None:
        """Refuse data that lacks an input before any work starts."""
        names = list(inputs)
        missing = [name for name in names if self.data is not None and name not in self.data]
        if missing:
            what = f"the data has no array {missing[0]}, an input of the model"
            raise OptpassError("data", what, f"give arrays {', '.join(names)}")

    def run(self, dense: Open, optimized: Open, reference: Reference) -> list[Metric]:
        """Figures of one engine beside its dense twin, which is let go before the other is opened.

        But for agreement on given data, whose outputs may be larger than an engine: there both are open.
        """
        session = dense()
        if isinstance(session, Denoiser) and (found := self._drawn(session, optimized, reference)):
            return found
        del session
        if self.data is None:
            answers = list(metrics.answers(dense(), metrics.random_inputs(reference)))
            return metrics.agreed(answers, optimized(), random=True)
        if self.metric is None:
            return metrics.agreement(dense(), optimized(), dict(self.data), random=False)
        scores = metrics.scores(self.metric, dense(), dict(self.data))
        session = optimized()
        return [
            metrics.paired(self.metric, session.name, scores, metrics.scores(self.metric, session, dict(self.data)))
        ]

    def _drawn(self, session: Denoiser, optimized: Open, reference: Reference) -> list[Metric]:
        """Similarity of samples, where features are kept between the steps of one of the engines."""
        if not session.manifest.sampler:
            return []
        given = self.data or reference.example
        conditions = {name: given[name] for name in session.roles.conditions}
        expected, _ = similarity.samples(session, conditions)
        other = optimized()
        if not isinstance(other, Denoiser) or not other.keeps:
            return []
        found, taken = similarity.samples(other, conditions)
        return metrics.similar(other.name, found, expected, taken)
