"""What `plan` says of a run that begins, and how it turned out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fmscale.data.order import shares
from fmscale.distributed import World
from fmscale.log import get_logger
from fmscale.planning.advice import GIB
from fmscale.planning.devices import CPU, NETWORK_GB_PER_S, Cluster, found_gpu, stated_rates
from fmscale.planning.plans import plan_phase
from fmscale.planning.stock import Shape, Stock

if TYPE_CHECKING:
    from fmscale.train import Job

log = get_logger(__name__)
REMEMBERED = 200  # steps of a bucket, the last ones, by which it is judged


class Expectation:
    """A phase as it was planned, beside what is measured.

    Args:
        job: the run, in the phase.
    """

    def __init__(self, job: Job) -> None:
        buckets, self.cluster = job.dataset.mixture.buckets, cluster_here(job.world, job.config.engine.dtype)
        shapes = tuple(Shape(bucket.height, bucket.width, bucket.count) for bucket in buckets)
        often = shares([bucket.counts for bucket in buckets], job.dataset.mixture.weights)
        stock = Stock((), shapes, often, job.dataset.text_tokens, 0.0)
        self.plan = plan_phase(job.phase, stock, job.world.world_size, self.cluster)
        self.seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self.memory = 0.0

    def announce(self) -> None:
        """Say in a line what to expect."""
        fullest, cluster = self.plan.fullest, self.cluster
        of = "" if cluster.gpu is None else f", of {cluster.gpu.usable / GIB:.1f}"
        memory = f"{fullest.memory.total / GIB:.2f} GiB of a rank's memory in bucket {fullest.shape.name}{of}"
        step = self.plan.step
        pace = "" if step is None else f"{step.total:.3f} s a step, {self.plan.images_per_s:.1f} images/s, "
        log.info("plan     %s%s", pace, memory)

    def note(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take what was written of some steps."""
        for record in records:
            self.seconds[record["bucket"]].append(record["step_s"])
            self.memory = max(self.memory, record["memory_gb"] * 1e9)

    def compare(self) -> None:
        """Say in a line for each bucket how it turned out."""
        for bucket in self.plan.buckets:
            if times := self.seconds.get(bucket.shape.name):
                planned = "" if bucket.step is None else f"{bucket.step.total:.3f} s a step planned, "
                log.info("plan     bucket %s: %s%.3f s measured", bucket.shape.name, planned, median(times))
        if self.memory:
            whole = "" if self.cluster.gpu else ", of the whole process with its libraries"
            planned = f"{self.plan.fullest.memory.total / GIB:.2f} GiB planned"
            log.info("plan     memory: %s, %.2f measured%s", planned, self.memory / GIB, whole)


def cluster_here(world: World, dtype: str) -> Cluster:
    """Where this process trains; a GPU that no data sheet is known of is planned without times."""
    network = NETWORK_GB_PER_S * 1e9
    if world.device.type != "cuda":
        return Cluster(CPU, None, None, world.world_size, network)
    found = torch.cuda.get_device_properties(world.device)
    name, gpu = found_gpu(found.name, found.total_memory)
    return Cluster(name, gpu, stated_rates(name, dtype), torch.cuda.device_count(), network)
