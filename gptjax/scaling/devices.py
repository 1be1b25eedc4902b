# SPDX-License-Identifier: Apache-2.0
"""What devices can do, from the vendors' data sheets."""

from typing import NamedTuple


class Device(NamedTuple):
    """One of JAX's devices: a chip, or a core of a TPU v2 or v3."""

    peak_flops: float  # FLOP/s of dense products in bf16
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes of it

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on products, not memory, take the time (Williams et al. 2009)."""
        return self.peak_flops / self.bandwidth


def of(kind: str) -> Device | None:
    """The device of a name, as JAX's device_kind says it; None = not known here."""
    return _DEVICES.get(kind)


def _device(teraflops: float, gigabytes_a_second: float, gibibytes: float) -> Device:
    return Device(teraflops * 1e12, gigabytes_a_second * 1e9, gibibytes * 2**30)


_V5E, _V5P, _V6E = _device(197, 819, 16), _device(459, 2765, 95), _device(918, 1640, 32)
_DEVICES = {
    'TPU v2': _device(22.5, 350, 8),
    'TPU v3': _device(61.5, 450, 16),
    'TPU v4': _device(275, 1228, 32),
    'TPU v4 lite': _device(138, 614, 8),
    'TPU v5 lite': _V5E,
    'TPU v5e': _V5E,
    'TPU v5': _V5P,
    'TPU v5p': _V5P,
    'TPU v6 lite': _V6E,
    'TPU v6e': _V6E,
    'NVIDIA A10G': _device(70, 600, 24),
    'NVIDIA L4': _device(121, 300, 24),
    'NVIDIA L40S': _device(362, 864, 48),
    'NVIDIA A100-SXM4-40GB': _device(312, 1555, 40),
    'NVIDIA A100-PCIE-40GB': _device(312, 1555, 40),
    'NVIDIA A100-SXM4-80GB': _device(312, 2039, 80),
    'NVIDIA A100 80GB PCIe': _device(312, 1935, 80),
    'NVIDIA H100 80GB HBM3': _device(989, 3350, 80),
    'NVIDIA H100 PCIe': _device(756, 2000, 80),
    'NVIDIA H100 NVL': _device(835, 3900, 94),
    'NVIDIA H200': _device(989, 4800, 141),
    'NVIDIA H200 NVL': _device(835, 4800, 141),
    'NVIDIA GH200 480GB': _device(989, 4000, 96),
    'NVIDIA B200': _device(2250, 8000, 180),
    'NVIDIA GB200': _device(2500, 8000, 186),
}
