"""The highest rate of matrix products that a device can have, for utilisation (MFU)."""

import re
import time
from dataclasses import dataclass

import torch

from bigtrain.config import Precision

_TERA = 10**12
_MATRIX = 512  # of the measurement on a CPU: large enough for its full rate, 0.3 G operations
_MEASURE_SECONDS = 0.05

# Dense rates in T operations per second, as the makers' data sheets have them: products in bf16 with fp32
# accumulation, of fp32 numbers rounded to tf32, and of fp32 numbers. Sheets that name the rate with 2:4 sparsity
# are halved. The whole name must match: a laptop's, a cut-down or a partitioned (MIG) device of the same family
# is another device.
#   A100   NVIDIA A100 datasheet (2021)          H100, H200   NVIDIA H100 / H200 datasheets (2023, 2024)
#   GH200  NVIDIA GH200 datasheet (2023)         B200         NVIDIA HGX/DGX B200 datasheets (2024), per GPU
#   L4, L40S  NVIDIA datasheets (2023)           RTX 4090     NVIDIA Ada architecture whitepaper (2022)
#   MI300X, MI250X  AMD Instinct data sheets (2023, 2021); MI250X: one of its two dies, which is a device
_PEAKS: list[tuple[str, dict[str, float]]] = [
    (r"NVIDIA A100.*(40|80)GB.*", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM.*", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"NVIDIA H100 PCIe", {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    (r"NVIDIA H100 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"NVIDIA H200", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"NVIDIA H200 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"NVIDIA GH200 .*", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"NVIDIA B200", {"bf16": 2250.0, "tf32": 1100.0, "fp32": 75.0}),
    (r"NVIDIA L4", {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    (r"NVIDIA L40S", {"bf16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    (r"NVIDIA GeForce RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"AMD Instinct MI300X.*", {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    (r"AMD Instinct MI250X.*", {"bf16": 191.5, "fp32": 47.9}),
]


@dataclass(frozen=True, slots=True)
class Peak:
    """A rate, and where it is from."""

    flops_per_second: float
    """Of one device."""
    source: str
    """For people: ``data sheet of NVIDIA H200, bf16`` or ``measured ...``."""


def find_peak(device: torch.device, precision: Precision) -> Peak | None:
    """Return the peak of this rank's device; of a CPU a measured one, of an unknown device None."""
    if device.type == "cpu":
        return measure_cpu(precision)
    # Of fp8, too, utilisation is told in terms of bf16: some of the products stay in it.
    kind = Precision.bf16 if precision is Precision.fp8 else precision
    return published_peak(torch.cuda.get_device_name(device), kind.name)


def published_peak(device_name: str, kind: str) -> Peak | None:
    """Return the peak by the maker's data sheet, or None.

    Args:
        device_name: As ``torch.cuda.get_device_name`` returns it.
        kind: ``bf16``, ``tf32`` or ``fp32``.
    """
    if "MIG" in device_name.split():
        return None
    for pattern, rates in _PEAKS:
        if re.fullmatch(pattern, device_name) and kind in rates:
            return Peak(rates[kind] * _TERA, f"data sheet of {device_name}, {kind}")
    return None


def measure_cpu(precision: Precision) -> Peak:
    """Measure the rate of square matrix products with this process's threads, in about a twentieth of a second.

    It is what torch reaches, not what the processor could. Time in which other processes had the cores is left out.
    """
    dtype = torch.bfloat16 if precision.base is Precision.bf16 else torch.float32
    left, right = torch.ones(2, _MATRIX, _MATRIX, dtype=dtype)
    result = left @ right
    best, end, threads = float("inf"), time.perf_counter() + _MEASURE_SECONDS, torch.get_num_threads()
    while time.perf_counter() < end:
        begin = time.process_time()
        torch.mm(left, right, out=result)
        best = min(best, (time.process_time() - begin) / threads)
    return Peak(2 * _MATRIX**3 / best, f"measured: {_MATRIX} x {_MATRIX} products, {precision.name}, {threads} threads")
