"""Write a run's weights for transformers: ``python launch/export.py checkpoint=runs/gpt_nano out=exported``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config import Precision, Quantisation, WandbMode
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    checkpoint: LocalPath
    """Directory of a run (its newest checkpoint that verifies is taken), or of one of its checkpoints."""
    out: LocalPath
    """Directory to be made; it must not exist."""
    dtype: Precision = Precision.fp32
    """``fp32`` is exactly what was trained; ``bf16`` is half as large."""
    merge: bool = True
    """Merge adapters into the weights; false writes them alone, as peft opens them beside their base."""
    average: str = "1"
    """Write the mean of so many checkpoints, this one and those before it (Izmailov et al. 2018); or ``moving``, the average of ``optimizer.average``."""
    quantise: Quantisation | None = None
    """Weights of linear layers by torchao: ``int8`` or ``fp8``, a quarter of fp32, ``int4``, an eighth. The loss on held-out text is said before and after."""
    max_shard_gb: Annotated[float, Bound(gt=0)] = 4.0
    """Largest file of weights in gigabytes (10^9 bytes), unless a single tensor is larger."""
    wandb: WandbMode = WandbMode.disabled
    """Make the export an artifact of the run on Weights & Biases: ``auto``, ``online`` or ``offline``."""


MOST_AVERAGED = 1000  # checkpoints
HELP = """\
Write the weights, the configuration and the tokenizer of a run so that transformers opens them, with no code of ours:

  python launch/export.py checkpoint=runs/gpt_nano out=exported/gpt_nano
  python launch/export.py checkpoint=runs/llama3_1b/checkpoints/step-00020000 out=exported/llama dtype=bf16

  >>> AutoModelForCausalLM.from_pretrained("exported/gpt_nano"), AutoTokenizer.from_pretrained("exported/gpt_nano")

The way back: +model=<preset of the same shape> model.init_from=<directory or hub id>.
"""


def run(config: ExportConfig) -> None:
    from bigtrain import log
    from bigtrain.checkpoint.store import step_of
    from bigtrain.errors import ConfigError
    from bigtrain.run.export import MOVING, export
    from bigtrain.telemetry.text import format_bytes

    log.setup(hydra_cli.rank())
    if config.average != MOVING and not (config.average.isdecimal() and 0 < int(config.average) <= MOST_AVERAGED):
        raise ConfigError(f"average={config.average}: must be a number from 1 to {MOST_AVERAGED}, or {MOVING}")
    out = Path(config.out)
    exported = export(
        Path(config.checkpoint),
        out,
        precision=config.dtype,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
        merge=config.merge,
        average=config.average,
        quantised=config.quantise,
    )
    print(f"checkpoint  {exported.checkpoint}")
    if exported.averaged:
        print(f"mean of     {', '.join(path.name for path in exported.averaged)}")
    print(f"weights     {exported.num_parameters:,} numbers in {config.dtype.name}")
    print(f"tokenizer   {'the one of the run' if exported.has_tokenizer else 'none: the data were synthetic'}")
    if exported.losses:
        before, after = exported.losses
        print(f"loss        {before:.4f} on held-out text, {after:.4f} in {config.quantise.name}")
    print(
        f"written     {out}, {format_bytes(sum(file.stat().st_size for file in out.rglob('*.safetensors')))} of weights"
    )
    if config.wandb is not WandbMode.disabled:
        from bigtrain.run.directory import locate, read_config
        from bigtrain.telemetry.wandb_logger import log_export

        directory, _ = locate(Path(config.checkpoint))
        told = log_export(directory, out, read_config(directory), config.wandb, step_of(exported.checkpoint))
        print(f"artifact    {told}")


main = partial(hydra_cli.command, ExportConfig, run, HELP)
