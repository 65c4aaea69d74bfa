"""What measuring has cost a trial, in time and memory."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_sharpness.verify.traces import Trace

#: Intervals that the overhead is said of.
INTERVALS = (10, 100, 1000)


def cost(first: Trace, second: Trace, measured: Trace) -> dict[str, Any]:
    """Seconds of an iteration, a forward-only pass, a probe and a measurement; overhead; bytes.

    The first iteration of a run makes what later ones find, and is left out. A measurement is what
    an iteration with it takes longer than the median one without.
    """
    plain, on = (first.rank(0), second.rank(0)), measured.rank(0)
    iterations = [run.seconds[i] for run in plain for i in run.made[1:]]
    iteration = _median(iterations)
    confirmed = {line["confirmed"]: line for line in on.confirmed}
    taken = [on.seconds[i] - iteration for i in confirmed if i in on.seconds] if iteration else []
    later = _median(taken[1:]) or _median(taken)
    alone = len({run.rank(0).facts["process"] for run in (first, second, measured)}) > 1
    return {
        "iteration_seconds": iteration,
        "pass_seconds": _median([s for line in confirmed.values() for s in line["passes"]]),
        "probe_seconds": _median([s for line in confirmed.values() for s in line["probes"]]),
        "first_measurement_seconds": taken[0] if taken else None,
        "measurement_seconds": later,
        "overhead": {
            str(every): later / (every * iteration) if later and iteration else None
            for every in INTERVALS
        },
        "device_memory": _memory("device_memory", first, measured),
        "host_memory": _memory("host_memory", first, measured) if alone else None,
    }


def _memory(name: str, first: Trace, measured: Trace) -> dict[str, int] | None:
    """Bytes of the rank whose memory measuring has raised most: without and with it."""
    pairs = []
    for rank in range(first.ranks):
        off, on = (list(getattr(run.rank(rank), name).values())[-1] for run in (first, measured))
        if off is None or on is None:
            return None
        pairs.append((on - off, {"rank": rank, "off": off, "on": on}))
    return max(pairs, key=lambda pair: pair[0])[1]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
