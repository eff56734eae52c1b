"""The maps of a sampling run so far, for showing them while it samples."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..concepts import Concepts
from ..observing.recorder import Recorder
from ..reading.maps import MeanWhereSeen, competing

INTERVAL = 0.35


@dataclass(frozen=True)
class MapsSoFar:
    """The mean over the evaluations so far and the default layers.

    Attributes:
        values: (K, h, w) in 0..1, of the first image.
        coverage: as in ``Recording``.
        evaluations: how many the mean is over.
    """

    values: Tensor
    concepts: Concepts
    coverage: tuple[float, float]
    evaluations: int


class LiveMaps:
    """A listener of ``observe`` that hands on the maps so far, at most every ``interval`` seconds.

    It takes the scores that have reached the CPU and never waits for the others, so that of a run on a GPU
    the maps are one evaluation behind. Nothing is computed while nobody listens.
    """

    def __init__(
        self,
        send: Callable[[MapsSoFar], None],
        listening: Callable[[], bool],
        interval: float = INTERVAL,
    ) -> None:
        self._send, self._listening, self._interval = send, listening, interval
        self._due = 0.0
        self._sums: weakref.WeakKeyDictionary[Recorder, _Sum] = weakref.WeakKeyDictionary()

    def __call__(self, recorder: Recorder) -> None:
        if time.monotonic() < self._due or not self._listening():
            return
        so_far = self._sums.setdefault(recorder, _Sum())
        scores, so_far.next = recorder.arrived(so_far.next)
        if not scores:
            return
        for evaluation in scores:
            so_far.mean.add(competing(evaluation[:, 0], recorder.space, 1.0, 1).mean(0))
            so_far.count += 1
        values = so_far.mean.value.nan_to_num(0)
        self._send(MapsSoFar(values, recorder.concepts, recorder.coverage, so_far.count))
        self._due = time.monotonic() + self._interval


@dataclass
class _Sum:
    mean: MeanWhereSeen = field(default_factory=MeanWhereSeen)
    count: int = 0
    next: int = 0
