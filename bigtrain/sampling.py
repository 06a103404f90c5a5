"""Text from a trained run, in one process."""

from pathlib import Path

import torch

from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.checkpoint.store import step_of
from bigtrain.data.index import read_index
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.engine.state import MODEL, whole_entry
from bigtrain.engine.wrap import materialise
from bigtrain.log import get_logger
from bigtrain.models import build_model
from bigtrain.models.generation import generate
from bigtrain.run_files import find_whole, read_config
from bigtrain.telemetry.files import SAMPLES_FILE, JsonLines


def sample_run(
    path: Path,
    *,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> list[str]:
    """Return continuations of ``prompt`` by the model of a run, and keep them in its ``samples.jsonl``.

    Args:
        path: directory of the run, or of one of its checkpoints.
        prompt: text to continue.
        num_samples: number of continuations.
        max_new_tokens: longest continuation.
        temperature: 0 always takes the likeliest token.
        top_k: draw from so many of the likeliest tokens; None = from all.
        top_p: draw from the likeliest tokens that together have this probability; None = from all.
        seed: the same seed gives the same texts.

    Raises:
        CheckpointError: no whole checkpoint.
        DataError: the run was trained without a tokenizer.
        ConfigError: a prompt or a setting that the model cannot serve.
    """
    run, checkpoint = find_whole(path)
    config = read_config(run)
    tokenizer = load_tokenizer(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = build_model(config.model)
    materialise(model, device)
    load_checkpoint(checkpoint, {MODEL + name: whole_entry(p) for name, p in model.named_parameters()})
    model.eval()
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    eos_id = read_index(run, check_sizes=False).tokenizer.eos_id
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(num_samples):
        new_ids = generate(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            eos_id=eos_id,
        )
        texts.append(tokenizer.decode(new_ids))
    _keep(run, step_of(checkpoint), prompt, texts)
    return texts


def _keep(run: Path, step: int, prompt: str, texts: list[str]) -> None:
    """Leave the texts in the run, for its report and dashboard; a run that cannot be written goes without."""
    try:
        samples = JsonLines(run / SAMPLES_FILE)
    except OSError as error:
        get_logger().warning(f"the texts are not kept: {error}")
        return
    for text in texts:
        samples.write({"step": step, "prompt": prompt, "text": text})
    samples.close()
