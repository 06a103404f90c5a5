"""How fast the machine is, and where a training step's time goes: ``python benchmarks/roofline.py``.

Measures the rate of large matrix products and the bandwidth of large copies; then takes training steps under torch's
profiler and adds the time of every operation up by what it is for. *At the machine's rate* is how long the products of
the model and the traffic of the optimizer would take at the measured rates, if nothing else happened.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import turns
from overhead import bare_loop, make_values
from step import build_parser, make_config, parse
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bigtrain.config import EngineKind, TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import init_process_group, pick_device, shut_down
from bigtrain.models.flops import flops_per_token
from bigtrain.models.sizes import model_sizes
from bigtrain.processes import RankInfo
from bigtrain.run.data import open_data
from bigtrain.testing.ranks import run_ranks

# The first that matches says what an operation is for.
PURPOSES = {
    "attention": r"attention|flash|fmha|sdpa|cudnn.*(fprop|bprop)",
    "products": r"aten::(mm|addmm|bmm|baddbmm|_scaled_mm)$|gemm|cutlass|nvjet|cublas|xmma|mkl",
    "optimizer": r"adam",
    "clipping": r"foreach_norm|vector_norm|lpnorm|foreach_mul|clamp",
    "loss": r"softmax|gather|scatter|nll_loss|cross_entropy",
    "norms": r"norm",
    "feed-forward's activation": r"gelu|silu",
    "embeddings": r"embedding|index",
    "communication": r"c10d|nccl|gloo|all_?reduce|all_?gather|reduce_?scatter",
    "copies, sums, scaling": r"aten::(copy_|_to_copy|add|add_|mul|mul_|div|div_|sum|fill_|zero_|cat|clone|_foreach)"
    r"|elementwise|reduce_kernel|memcpy|memset|triton",
}
ADAM_BYTES = 28
"""Per parameter: weight, gradient and two moments are read, all but the gradient written, in fp32."""


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of ``action``."""
    times = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large product of random matrices."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / seconds_of(partial(torch.mm, left, right, out=out), device, 10)


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(partial(target.copy_, source), device, 10)


def measure(config: TrainConfig, steps: int) -> tuple[float, float, float, dict[str, float]]:
    """Return products per second, bytes per second, seconds per step, and seconds per step by purpose."""
    info = RankInfo.from_env()
    device = pick_device(info)
    init_process_group(info, device)
    dtype = torch.float32 if config.engine.precision.name == "fp32" else torch.bfloat16
    rates = matmul_rate(device, dtype), copy_rate(device)
    stream = open_data(config)["train"]
    batch: Batch = stream.gather(stream.ids(0, config.train.micro_batch_size)).to(device)
    step = bare_loop(config, info, device, make_values(config))
    seconds = seconds_of(partial(step, batch), device, steps)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiled:
        for _ in range(steps):
            step(batch)
        if on_gpu:
            torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        if on_gpu and event.device_type is not DeviceType.CUDA:
            continue  # the time of its kernels, which have events of their own
        if getattr(event, "is_user_annotation", False):
            continue  # on a GPU these span kernels too
        taken = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / steps
        spent[purpose_of(event.key)] = spent.get(purpose_of(event.key), 0.0) + taken
    shut_down()
    return *rates, seconds, spent


def purpose_of(name: str) -> str:
    found = (purpose for purpose, pattern in PURPOSES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "the rest")


def main() -> None:
    args = parse(build_parser(__doc__))
    config = make_config(argparse.Namespace(**vars(args) | {"turns": 0}), "", EngineKind.ddp)
    environ = {"OMP_NUM_THREADS": str(args.threads)}
    results = run_ranks(measure, 1, config, args.steps, timeout_seconds=1800, environ=environ)
    products, bandwidth, seconds, spent = results[0]
    tokens = args.batch * args.sequence_length
    flops = flops_per_token(config.model, args.sequence_length)
    ideal = {
        "products": flops.products * tokens / products,
        "attention": (flops.causal - flops.products) * tokens / products,
        "optimizer": ADAM_BYTES * model_sizes(config.model).total / bandwidth,
    }
    facts = (
        f"{turns.machine()}, {args.threads} threads, {args.precision}\n"
        f"products {products / 1e12:.3f} TFLOP/s, copies {bandwidth / 1e9:.1f} GB/s read and written\n"
        f"{config.model.name}, {args.batch} x {args.sequence_length} tokens: {seconds * 1e3:.1f} ms per step, "
        f"{flops.full_attention * tokens / seconds / products:.1%} of the measured rate (full attention), "
        f"{flops.causal * tokens / seconds / products:.1%} (causal)\n"
    )
    bounded = "at the machine's rate"
    print(f"{facts}\n{'':<28}{'ms':>9}{'share':>8}{bounded:>24}")
    total = sum(spent.values())
    for purpose, taken in sorted(spent.items(), key=lambda item: -item[1]):
        bound = f"{ideal[purpose] * 1e3:.1f}" if purpose in ideal else ""
        print(f"{purpose:<28}{taken * 1e3:>9.1f}{taken / total:>8.1%}{bound:>24}")
    turns.write_json(
        args.json, "roofline", conditions=facts, flops_per_second=products, bytes_per_second=bandwidth, seconds=spent
    )


if __name__ == "__main__":
    main()
