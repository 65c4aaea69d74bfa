"""The model of the cost: it counts bytes, and takes a forward pass as given::

    probe        =  forward + write + gather
    measurement  =  snapshot + products + passes · probe + restore
    overhead     =  measurement / (interval · iteration)

A part of a measurement takes as long as its bytes at the bandwidth that is stated. Left out is what
does not grow with the model: latencies of kernels and collectives, random states, the reduction of
the loss. ``benchmarks/growth.py`` compares the model with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sharpness.estimate.configuration import Run

#: Defaults of the command's flags. A copy reaches about 80 % of the 3350 GB/s of an H100 SXM, one
#: 400 Gb/s adapter for each GPU brings 50 GB/s, and a dense model computes 40 % of the peak. In
#: a long training the certified search takes so many passes: benchmarks/passes.py has 2.56 from the
#: last step's η_c, and benchmarks/training.py 2.5 from that of 100 iterations before.
MEMORY_BANDWIDTH = 2680.0
NETWORK_BANDWIDTH = 50.0
TFLOPS = 400.0
PASSES = 2.6
INTERVALS = (10, 100, 1000)

#: Bytes a second between a GPU and the pinned memory of its host, where offloaded copies lie.
HOST_BANDWIDTH = 25e9


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a measurement, and its forward passes.

    Attributes:
        forward: a forward-only pass over the global batch.
        write: θ(η) into the model.
        gather: how long a probe waits for the other ranks' parameters.
        snapshot: θ_t kept.
        products: the slope and the norm of the update.
        restore: θ_{t+1} back into the model, and gathered.
        passes: probes of a measurement.
    """

    forward: float
    write: float
    gather: float
    snapshot: float
    products: float
    restore: float
    passes: float

    @property
    def probe(self) -> float:
        """Seconds: forward + write + gather."""
        return self.forward + self.write + self.gather

    @property
    def measurement(self) -> float:
        """Seconds: snapshot + products + passes · probe + restore."""
        return self.snapshot + self.products + self.passes * self.probe + self.restore

    def overhead(self, every: int, iteration: float) -> float:
        """measurement / (every · iteration), with the seconds of an ``iteration``."""
        return self.measurement / (every * iteration)


def cost(
    run: Run, forward: float, *, memory_bandwidth: float, network_bandwidth: float, passes: float
) -> Cost:
    """What a measurement takes. In bytes read and written for each owned parameter, with m bytes of
    the model's own::

        snapshot 8 · copies    products 180    write 8 + m    restore 4 + m

    (the products are 25 operations in fp32, counted as if none found its operands in a cache) over
    the memory bandwidth, and 4 · copies more over the host's where the copies are offloaded
    (restore: 4 · (copies − 1)). The restored parameters are gathered once too.

    Args:
        run: the run.
        forward: seconds of a forward-only pass over the global batch.
        memory_bandwidth: bytes read and written a second.
        network_bandwidth: bytes a second that an all-gather brings a rank.
        passes: probes of a measurement.
    """

    def seconds(moved: int, copies: int) -> float:
        offloaded = 4 * copies * run.owned / HOST_BANDWIDTH if run.offloads else 0.0
        return moved * run.owned / memory_bandwidth + offloaded

    gather = run.gathered / network_bandwidth
    return Cost(
        forward=forward,
        write=seconds(8 + run.model_bytes, run.copies),
        gather=exposed_gather(run, forward, gather),
        snapshot=seconds(8 * run.copies, run.copies),
        products=seconds(180, run.copies),
        restore=seconds(4 + run.model_bytes, run.copies - 1) + gather,
        passes=passes,
    )


def exposed_gather(run: Run, forward: float, gather: float) -> float:
    """Seconds that a probe waits for a gather of ``gather`` seconds.

    All of it, where it comes before the pass. Overlapped, the first micro-batch f on a stage hides
    it, and the p stages meet their first micro-batch one after the other: p · max(0, gather − f),
    with f = forward/(m + p − 1) for m micro-batches.
    """
    if not run.overlaps:
        return gather
    first = forward / (run.micro_batches + run.stages - 1)
    return run.stages * max(0.0, gather - first)


def forward_seconds(run: Run, tflops: float) -> float:
    """flops/(gpus · tflops · 10¹²) · (m + p − 1)/m for m micro-batches through p stages."""
    bubble = (run.micro_batches + run.stages - 1) / run.micro_batches
    return run.flops / (run.gpus * tflops * 1e12) * bubble


def iteration_seconds(run: Run, forward: float) -> float:
    """3 · forward, since a backward pass is two; 4 · forward where it repeats the forward pass."""
    return (4.0 if run.recomputes else 3.0) * forward
