"""Our engines against each other and against the bare engines: ``python benchmarks/engines.py --ranks 2``.

The same training as in ``step.py``, under every engine twice: by ``trainer.train``, and by a loop written by hand around
DistributedDataParallel, ``fully_shard`` or ``deepspeed.initialize``. *Over bare* is what our layer costs.
"""

import statistics
import sys
import tempfile
from argparse import Namespace
from functools import partial
from importlib.util import find_spec

import turns
from step import OURS, bare, build_parser, conditions, loss_of, make_config, measure, ours, parse, rows_of, same_work
from turns import Measured

from bigtrain.config import EngineKind
from bigtrain.engine.deepspeed_zero import STAGES

KINDS = [EngineKind.ddp, EngineKind.fsdp, *STAGES]


def report(args: Namespace, measured: dict[str, Measured]) -> str:
    """Return one line per engine."""
    kinds = [kind for kind in args.engines if {f"{OURS} {kind}", f"bare {kind}"} <= measured.keys()]
    tokens = args.batch * args.sequence_length
    fastest = min(statistics.median(measured[f"{OURS} {kind}"].seconds) for kind in kinds)
    lines = [
        f"{'':<8}{'tokens/s':>12}{'of fastest':>12}{'by hand':>12}{'time over bare':>16}{'quartiles':>16}{'peak MB':>10}"
        f"{'over bare':>11}{'last loss':>11}"
    ]
    for kind in kinds:
        own, by_hand = measured[f"{OURS} {kind}"], measured[f"bare {kind}"]
        seconds, bare_seconds = statistics.median(own.seconds), statistics.median(by_hand.seconds)
        low, _, high = turns.quartiles([a / b for a, b in zip(own.seconds, by_hand.seconds, strict=True)])
        lines.append(
            f"{kind:<8}{tokens / seconds:>12,.0f}{fastest / seconds:>12.3f}{tokens / bare_seconds:>12,.0f}"
            f"{seconds / bare_seconds:>15.3f}x{f'{low:.3f} - {high:.3f}':>16}{own.peak_bytes / 1e6:>10,.0f}"
            f"{own.peak_bytes / by_hand.peak_bytes:>10.3f}x{loss_of(own):>11.5f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = build_parser(__doc__)
    names = [kind.name for kind in KINDS]
    parser.add_argument("--engines", nargs="+", default=names, choices=names, help="by default all")
    args = parse(parser)
    if not find_spec("deepspeed"):
        print("left out: zero1, zero2, zero3: deepspeed is not installed")
        args.engines = [name for name in args.engines if EngineKind[name] not in STAGES]
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        configs = {name: make_config(args, scratch, EngineKind[name]) for name in args.engines}
        sides = {f"{OURS} {name}": partial(ours, config) for name, config in configs.items()}
        sides |= {f"bare {name}": partial(bare, config) for name, config in configs.items()}
        measured = measure(args, sides)
    facts = conditions(args, configs[args.engines[0]])
    print(f"{facts}\n{report(args, measured)}")
    turns.write_json(args.json, "engines", conditions=facts, rows=rows_of(measured))
    if different := same_work(measured, args.precision):
        sys.exit("other work: " + ", ".join(different))


if __name__ == "__main__":
    main()
