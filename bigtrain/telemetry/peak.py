"""Peak matmul rates of devices, for utilisation (MFU)."""

import re
import time
from dataclasses import dataclass

import torch

from bigtrain.config import Precision

_TERA = 10**12
_MATRIX = 512  # side of the matrices measured on a CPU: large enough for its full rate, 0.3 G operations
_MEASURE_SECONDS = 0.05

# Dense rates in T operations per second, as the makers publish them: products in bf16 with fp32 accumulation, of
# fp32 numbers rounded to tf32, and of fp32 numbers. Rates with 2:4 sparsity are halved. The whole name must match:
# a laptop's, a cut-down or a partitioned (MIG) device of the same family is another device. No row without a source.
_PEAKS: list[tuple[str, dict[str, float]]] = [
    # A100 data sheet (nvidia-1758950-r4): the same for SXM and PCIe
    (r"NVIDIA A100.*(40|80)GB.*", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    # "NVIDIA H100 Tensor Core GPU Architecture", table of the SXM5; the data sheet rounds it to 1,979 with sparsity
    (r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM.*", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # H100 data sheet: 1,513 and 756 with sparsity, 51
    (r"NVIDIA H100 PCIe", {"bf16": 756.5, "tf32": 378.0, "fp32": 51.0}),
    # nvidia.com/data-center/h100: 1,671 with sparsity
    (r"NVIDIA H100 NVL", {"bf16": 835.5}),
    # nvidia.com/data-center/h200: the rates of the H100 SXM
    (r"NVIDIA H200", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # Blackwell data sheet (3384703), one GPU of the HGX B200: 4.5 and 2.2 P with sparsity, 75
    (r"NVIDIA B200", {"bf16": 2250.0, "tf32": 1100.0, "fp32": 75.0}),
    # nvidia.com/data-center/l4: 242 and 120 with sparsity, 30.3
    (r"NVIDIA L4", {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    # L40S data sheet: 362.05 | 733 and 183 | 366 with sparsity, 91.6
    (r"NVIDIA L40S", {"bf16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    # "NVIDIA Ada GPU Architecture", table of the GeForce RTX 4090, with FP32 accumulation
    (r"NVIDIA GeForce RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    # AMD Instinct MI300X data sheet: 304 compute units x 2,048 operations x 2.1 GHz
    (r"AMD Instinct MI300X.*", {"bf16": 1307.4}),
    # AMD Instinct MI200 table: 383.0 and, by matrix cores, 95.7; a device is one of the two dies
    (r"AMD Instinct MI250X.*", {"bf16": 191.5, "fp32": 47.85}),
]


@dataclass(frozen=True, slots=True)
class Peak:
    """Rate of matrix products of one device."""

    flops_per_second: float
    source: str  # ``data sheet of NVIDIA H200, bf16`` or ``measured ...``


def find_peak(device: torch.device, precision: Precision) -> Peak | None:
    """Return the peak of this rank's device: of a CPU measured, of an unknown device None."""
    if device.type == "cpu":
        return measure_cpu(precision)
    # fp8 utilisation is relative to bf16 as well: some of the matmuls stay in bf16.
    kind = Precision.bf16 if precision is Precision.fp8 else precision
    return published_peak(torch.cuda.get_device_name(device), kind.name)


def published_peak(device_name: str, kind: str) -> Peak | None:
    """Return the peak of a device by the maker's data sheet, or None; ``kind`` is ``bf16``, ``tf32`` or ``fp32``."""
    if "MIG" in device_name.split():
        return None
    for pattern, rates in _PEAKS:
        if re.fullmatch(pattern, device_name) and kind in rates:
            return Peak(rates[kind] * _TERA, f"data sheet of {device_name}, {kind}")
    return None


def measure_cpu(precision: Precision) -> Peak:
    """Measure square matrix products with this process's threads, in about 0.05 s of its own processor time."""
    dtype = torch.bfloat16 if precision.base is Precision.bf16 else torch.float32
    left, right = torch.ones(2, _MATRIX, _MATRIX, dtype=dtype)
    result = left @ right
    best, end, threads = float("inf"), time.perf_counter() + _MEASURE_SECONDS, torch.get_num_threads()
    while time.perf_counter() < end:
        begin = time.process_time()
        torch.mm(left, right, out=result)
        best = min(best, (time.process_time() - begin) / threads)
    return Peak(2 * _MATRIX**3 / best, f"measured: {_MATRIX} x {_MATRIX} products, {precision.name}, {threads} threads")
