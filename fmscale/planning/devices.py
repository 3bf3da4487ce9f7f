"""What GPUs have and what they can do: from data sheets, or from a trial on the machine at hand."""

from __future__ import annotations

from typing import NamedTuple

from fmscale.errors import UserError
from fmscale.models.flops import peak_flops

USABLE = 0.95  # share of a GPU's memory: driver, CUDA's context, NCCL and what falls between blocks take the rest
# Shares of the data sheets' figures that are reached as a rule. A matrix product of 8192 x 8192 in bf16 reaches 0.80 of
# an H100, and those of these networks somewhat less; attention, forward and backward, about half of what they do.
GEMM_SHARE, ATTENTION_SHARE, COPY_SHARE, LINK_SHARE = 0.70, 0.40, 0.85, 0.80
NETWORK_GB_PER_S = 50.0  # of each GPU's own adapter, one way: 400 Gb/s, as in NVIDIA's DGX H100
HOST_GB_PER_S = 100.0  # of a GPU's share of its host's memory, which ZeRO-Offload's update reads and writes
HOP_S, NETWORK_HOP_S, CALL_S = 1e-6, 5e-6, 15e-6  # what a ring waits for at each GPU, at each node, and at its start


class Device(NamedTuple):
    """A GPU.

    Attributes:
        cuda_name: as CUDA gives it, without the maker.
        memory: bytes.
        copy: bytes that its memory reads and writes in a second.
        link: bytes that it sends to the other GPUs of its node in a second, one way.
        watts: of its board, at most.
    """

    cuda_name: str
    memory: float
    copy: float
    link: float
    watts: float

    @property
    def usable(self) -> float:
        """Bytes that a training can have."""
        return USABLE * self.memory


def _device(cuda_name: str, memory_gib: int, copy_gb_per_s: int, link_gb_per_s: int, watts: int) -> Device:
    return Device(cuda_name, memory_gib * 2**30, copy_gb_per_s * 1e9, link_gb_per_s * 1e9, watts)


# From NVIDIA's data sheets: memory, its bandwidth, NVLink's or PCIe's bandwidth one way, board power.
DEVICES: dict[str, Device] = {
    "b200": _device("B200", 180, 8000, 900, 1000),
    "h200": _device("H200", 141, 4800, 450, 700),
    "h100": _device("H100 80GB HBM3", 80, 3350, 450, 700),
    "h100-pcie": _device("H100 PCIe", 80, 2000, 64, 350),
    "a100": _device("A100-SXM4-80GB", 80, 2039, 300, 400),
    "a100-40": _device("A100-SXM4-40GB", 40, 1555, 300, 400),
    "a40": _device("A40", 48, 696, 32, 300),
    "a10": _device("A10", 24, 600, 32, 150),
    "l40s": _device("L40S", 48, 864, 32, 350),
    "l40": _device("L40", 48, 864, 32, 300),
    "l4": _device("L4", 24, 300, 32, 72),
    "rtx-a6000": _device("RTX A6000", 48, 768, 32, 300),
    "rtx-6000-ada": _device("RTX 6000 Ada Generation", 48, 960, 32, 300),
    "rtx3090": _device("GeForce RTX 3090", 24, 936, 32, 350),
    "rtx4090": _device("GeForce RTX 4090", 24, 1008, 32, 450),
    "rtx5090": _device("GeForce RTX 5090", 32, 1792, 64, 575),
}
CPU = "cpu"  # whose memory and rates only a trial knows


class Rates(NamedTuple):
    """What a device does.

    Attributes:
        gemm: FLOP/s of matrix products.
        attention: FLOP/s of attention, forward and backward.
        copy: bytes a second, read and written.
        link: bytes a second that each rank of a node sends in a ring; 0 where there is but one.
        source: where the figures are from.
    """

    gemm: float
    attention: float
    copy: float
    link: float
    source: str


class Cluster(NamedTuple):
    """Where a run is planned.

    Attributes:
        name: of its devices, as a user gives it.
        gpu: what they are; None for CPUs.
        rates: of each; None where they are not known.
        per_node: ranks on a node.
        network: bytes a second that each rank of a node sends to others, one way.
    """

    name: str
    gpu: Device | None
    rates: Rates | None
    per_node: int
    network: float

    @property
    def link(self) -> float:
        """Bytes a second within a node: as measured; where there was but one rank to measure, by the data sheet."""
        assert self.rates is not None
        sheet = LINK_SHARE * self.gpu.link if self.gpu else 0.0
        return self.rates.link or sheet or self.network

    def ring(self, world_size: int) -> float:
        """Bytes a second that a ring carries through all ranks.

        Within a node the link is its limit. Between nodes there is a ring for each adapter, so that all adapters of a
        node together carry what passes.
        """
        within = self.link if min(world_size, self.per_node) > 1 else float("inf")
        return min(within, self.per_node * self.network) if world_size > self.per_node else within

    def latency_s(self, world_size: int) -> float:
        """Seconds until a ring's last rank has what its first one sent."""
        nodes = -(-world_size // self.per_node)
        return CALL_S + (nodes - 1) * NETWORK_HOP_S + (world_size - nodes) * HOP_S


def stated_rates(name: str, dtype: str) -> Rates | None:
    """What a device does, by its data sheet; None for a CPU.

    Args:
        name: row of `DEVICES`, or `cpu`.
        dtype: `bf16` or `fp32`.
    """
    device = DEVICES.get(name)
    if device is None:
        return None
    peak = peak_flops(device.cuda_name, dtype)
    assert peak is not None, name
    shares = GEMM_SHARE * peak, ATTENTION_SHARE * peak, COPY_SHARE * device.copy, LINK_SHARE * device.link
    return Rates(*shares, "data sheet")


def found_gpu(cuda_name: str, memory: int) -> tuple[str, Device]:
    """A GPU of this machine: its name, that of its row where it has one, and what it is.

    Args:
        cuda_name: as CUDA gives it.
        memory: bytes, as CUDA gives them.
    """
    cuda_name = cuda_name.removeprefix("NVIDIA ")
    known = {device.cuda_name: name for name, device in DEVICES.items()}
    if cuda_name in known:
        return known[cuda_name], DEVICES[known[cuda_name]]._replace(memory=float(memory))
    return cuda_name, Device(cuda_name, float(memory), 0.0, 0.0, 0.0)


def check_device(name: str, key: str) -> str:
    """The name of a device, if there is one of that name.

    Args:
        name: as given.
        key: by which.

    Raises:
        UserError: names those there are.
    """
    if name.lower() not in {*DEVICES, CPU}:
        raise UserError(f"{key}: {name!r} is none of {', '.join([*DEVICES, CPU])}")
    return name.lower()
