"""Peaks: from the data sheet of exactly this device, or measured on a CPU, or none."""

import pytest
import torch

from bigtrain.config import Precision
from bigtrain.telemetry.peak import find_peak, published_peak


@pytest.mark.parametrize(
    ("name", "kind", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_published_peaks(name: str, kind: str, tflops: float):
    peak = published_peak(name, kind)
    assert peak.flops_per_second == tflops * 1e12
    assert name in peak.source and kind in peak.source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA L40",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "Some Accelerator 9000",
    ],
)
def test_an_unknown_device_has_no_peak(name: str):
    assert published_peak(name, "bf16") is None


def test_a_kind_that_the_data_sheet_does_not_name_has_no_peak():
    assert published_peak("AMD Instinct MI250X", "tf32") is None
    assert published_peak("NVIDIA H100 NVL", "tf32") is None


def test_a_cpu_is_measured_and_says_so():
    peak = find_peak(torch.device("cpu"), Precision.fp32)
    assert 1e8 < peak.flops_per_second < 1e14
    assert peak.source.startswith("measured") and f"{torch.get_num_threads()} threads" in peak.source
