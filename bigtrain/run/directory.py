"""The directory of a run, which the same command finds again.

``config.yaml`` is the resolved configuration, redacted.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from bigtrain import log
from bigtrain.checkpoint.loader import verify_checkpoint
from bigtrain.checkpoint.manifest import RUN_STATE_FILE
from bigtrain.checkpoint.store import (
    checkpoints_directory,
    find_checkpoints,
    find_damaged,
    newest_step,
    read_run_state,
    set_aside,
    step_of,
)
from bigtrain.config import (
    AdapterConfig,
    Load,
    ModelConfig,
    ModelKind,
    RopeScalingConfig,
    TaskKind,
    TrainConfig,
    Verify,
)
from bigtrain.config.check import RESUME_WORDS
from bigtrain.config.convert import flatten, from_dict, to_dict
from bigtrain.data.read.index import INDEX_FILE, PUBLISHED_DIRECTORY
from bigtrain.data.read.tokenizer import TOKENIZER_FILE
from bigtrain.distributed.collectives import on_rank0
from bigtrain.errors import EXIT_FINISHED, EXIT_RESUMABLE, CheckpointError, ConfigError
from bigtrain.files import CONFIG_FILE, read_json, such_as_runs, write_anew, writing
from bigtrain.log import redact
from bigtrain.models.hf.build import build_hf_model, has_own_code, read_hf_config
from bigtrain.models.hf.files import published_directory, weight_files
from bigtrain.models.hf.load import BUFFERS_FILE, MODEL_DIRECTORY, stored_buffers
from bigtrain.supervise.attempt import ATTEMPT_FILE, now, read_exit
from bigtrain.telemetry.files import EVENTS_FILE, JsonLines, read_jsonl

FACTS_FILE = "data.json"  # what is known of the data, such as the names of labels, mean and deviation of images
DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a Hugging Face model besides weights and tokenizer; the first one is needed."""


def write_run_files(config: TrainConfig, tokenizer: Path | None, facts: Mapping[str, Any] | None = None) -> None:
    """Write configuration, tokenizer, ``facts`` of the data, and description of the model of a run."""
    directory = config.run.directory
    with writing(directory):
        is_described = continued_model(config.model, directory) is not config.model
        write_config(directory, config)
        if tokenizer:
            keep_tokenizer(directory, tokenizer)
        if facts:
            write_anew(directory / FACTS_FILE, json.dumps(facts, indent=1))
        if not is_described:
            keep_model(directory, config.model)


def write_config(directory: Path, config: TrainConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_anew(directory / CONFIG_FILE, yaml.safe_dump(redact(to_dict(config)), sort_keys=False))


def keep_tokenizer(directory: Path, corpus_directory: Path) -> None:
    """Copy the tokenizer and the index, so that a run generates without its data."""
    published = (corpus_directory / PUBLISHED_DIRECTORY).rglob("*")
    for path in (corpus_directory / INDEX_FILE, corpus_directory / TOKENIZER_FILE, *filter(Path.is_file, published)):
        copy = directory / path.relative_to(corpus_directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def keep_model(directory: Path, model: ModelConfig) -> None:
    """Copy the description and the stored buffers of a Hugging Face model, so that a run continues without it."""
    if model.kind is not ModelKind.hf:
        return
    published, own = published_directory(model.name, list(DESCRIPTION_FILES)), directory / MODEL_DIRECTORY
    own.mkdir(parents=True, exist_ok=True)
    for name in DESCRIPTION_FILES:
        (own / name).unlink(missing_ok=True)
        if (published / name).is_file():
            shutil.copyfile(published / name, own / name)
    with torch.device("meta"):
        has_stored = model.pretrained or model.freeze_batch_norm
        buffers = dict(stored_buffers(build_hf_model(model).causal_lm)) if has_stored else {}
    if buffers:
        save_file(buffers, own / BUFFERS_FILE)


def own_model(model: ModelConfig, directory: Path) -> ModelConfig:
    """Return ``model`` with the run's own copy of its description as name, if it has one."""
    own = directory / MODEL_DIRECTORY
    return dataclasses.replace(model, name=str(own)) if (own / DESCRIPTION_FILES[0]).is_file() else model


def continued_model(model: ModelConfig, directory: Path) -> ModelConfig:
    """Return the run's own description of its model once it has a checkpoint, else the named one: the same model."""
    own = own_model(model, directory)
    if own is model or not find_checkpoints(directory):
        return model
    recorded = directory / CONFIG_FILE
    same_name = recorded.is_file() and yaml.safe_load(recorded.read_text())["model"]["name"] == model.name
    if same_name and not Path(str(model.name), DESCRIPTION_FILES[0]).is_file():
        return own
    try:
        named = read_hf_config(model.name).to_dict()
    except ConfigError:
        return own  # it is gone, or this is not where the run was begun
    kept = read_hf_config(own.name).to_dict()
    of_no_weight = {"_name_or_path", "transformers_version", "dtype", "architectures"}
    keys = [key for key in sorted(kept.keys() | named.keys()) if kept.get(key) != named.get(key)]
    if differing := [key for key in keys if key not in of_no_weight]:
        raise ConfigError(
            f"model.name={model.name}: another model than that of {directory}, which keeps its description in "
            f"{own.name}; {', '.join(differing)} differ: choose another run.name, or name the model that the run has"
        )
    return own


def unused_of_model(config: TrainConfig) -> list[str]:
    """Return what a new run does not use of its published model, a line each; ConfigError if files are missing."""
    model, setting = config.model, "model.init_from" if config.model.init_from else "model.name"
    name = model.init_from or (model.name if model.kind is ModelKind.hf else None)
    if name is None or is_run(name) or find_checkpoints(config.run.directory):
        return []
    found = []
    if has_own_code(name):
        found.append(
            f"{setting}={name}: its code (auto_map in its config.json) is not run; transformers' own "
            f"{read_hf_config(name, setting=setting).model_type} is trained"
        )
    reads_weights = (model.init_from or model.pretrained) and config.checkpoint.resume in RESUME_WORDS
    if reads_weights and Path(name).is_dir() and (others := weight_files(Path(name))[1]):
        found.append(f"{setting}={name}: not read: {', '.join(others)}; the weights are those of its safetensors files")
    return found


def locate(path: Path) -> tuple[Path, Path]:
    """Return run and checkpoint of ``path``: a run, of which the newest, or a checkpoint; CheckpointError if none."""
    if (path / RUN_STATE_FILE).is_file():
        return path.parent.parent, path
    found = find_checkpoints(path)
    if not found:
        if checkpoints_directory(path.parent) == path and find_checkpoints(path.parent):
            raise CheckpointError(f"{path} holds the checkpoints of a run; name that, {path.parent}, or one of them")
        such = such_as_runs(path, holding=f"{checkpoints_directory(Path()).name}/step-*[0-9]")
        raise CheckpointError(f"{path} has no complete checkpoint; name the directory of a run that has one{such}")
    return path, found[-1]


def is_run(path: str) -> bool:
    """Return whether ``path`` is a run with a checkpoint, or a checkpoint, rather than a published model."""
    return (Path(path) / RUN_STATE_FILE).is_file() or bool(find_checkpoints(Path(path)))


def find_whole(path: Path) -> tuple[Path, Path]:
    """Return the run, and its newest whole checkpoint or the one that ``path`` is; CheckpointError if none is."""
    run, newest = locate(path)
    candidates = [newest] if newest == path else on_rank0(lambda: [str(found) for found in find_checkpoints(run)])
    problems: list[str] = []
    for checkpoint in map(Path, reversed(candidates)):
        if not (found := verify_checkpoint(checkpoint, Verify.full)):
            if problems:
                log.get_logger().warning("\n  ".join([f"damaged, so {checkpoint} is taken:", *problems]))
            return run, checkpoint
        problems += found
    raise CheckpointError("\n  ".join([f"{path}: no whole checkpoint:", *problems]))


def label_names(run: Path) -> list[str]:
    """Return the names of the labels that a run predicts, numbers of those that its data lacks; none if all are numbers."""
    of_text = (read_json(run / INDEX_FILE).get("labels") or {}).get("names", [])
    names = of_text or read_json(run / FACTS_FILE).get("label_names", [])
    return names and [*names, *map(str, range(len(names), read_config(run).task.num_labels or 0))]


def read_config(directory: Path) -> TrainConfig:
    """Return the configuration of a run, with its present directory and its own copy of a Hugging Face model."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a run: it has no {CONFIG_FILE}; name the directory of a run{such_as_runs(directory)}"
        )
    config = from_dict(TrainConfig, yaml.safe_load(path.read_text()))
    place = Path(os.path.abspath(directory))
    run = dataclasses.replace(config.run, root=str(place.parent), name=place.name)
    return dataclasses.replace(config, run=run, model=own_model(config.model, directory))


def find_resume(config: TrainConfig) -> Path | None:
    """Return the verified checkpoint that this launch starts from, by ``checkpoint.resume``; all ranks call this.

    CheckpointError: there is one against ``never``, none against ``must``, none whole, none where there were some, or
    one of another model or optimizer.
    """
    directory, resume, verify = config.run.directory, config.checkpoint.resume, config.checkpoint.verify
    if resume == "never" and (found := on_rank0(lambda: [str(path) for path in find_checkpoints(directory)])):
        raise CheckpointError(
            f"checkpoint.resume=never, but {found[-1]} exists; choose another run.name or delete {directory}"
        )
    path, saved = newest_whole(directory, verify), on_rank0(lambda: last_saved_step(directory))
    if path:
        if saved > max([step_of(path), *on_rank0(lambda: [step_of(damaged) for damaged in find_damaged(directory)])]):
            log.get_logger().warning(f"step {saved} was saved too, and is not there any more; continuing from {path}")
        return _fitting(config, path, Load.all)
    if saved:
        place = checkpoints_directory(directory)
        why = f"{place} {'has no checkpoint now' if place.is_dir() else 'is not there'}"
        if place.is_symlink() and not place.exists():
            why = f"{place} is a link to {place.readlink()}, which is not there"
        lost = f"{directory} had saved step {saved}, but {why}"
        if resume != "never":
            raise CheckpointError(
                f"{lost}; is a disk not mounted? checkpoint.resume=never starts anew at step 0, another run.name leaves "
                "this run alone"
            )
        log.get_logger().warning(f"{lost}; checkpoint.resume=never: starts anew at step 0, and its metrics too")
    if resume == "must":
        raise CheckpointError(f"checkpoint.resume=must, but {directory} has no complete checkpoint")
    if resume in RESUME_WORDS:
        return None
    # Another run's checkpoint starts this one; later launches continue from this run's own.
    if not on_rank0(Path(resume).is_dir):
        raise CheckpointError(
            f"checkpoint.resume={resume}: there is no such directory; give auto, never, must, or another run or checkpoint"
            f"{such_as_runs(directory)}"
        )
    path = Path(on_rank0(lambda: str(locate(Path(resume))[1])))
    if problems := verify_checkpoint(path, verify):
        raise CheckpointError("\n  ".join([f"checkpoint.resume={resume}: damaged:", *problems]))
    return _fitting(config, path, config.checkpoint.load)


def newest_whole(directory: Path, verify: Verify, *, before: int = sys.maxsize) -> Path | None:
    """Return the newest checkpoint below step ``before`` that verifies, damaged ones set aside; collective."""
    while found := on_rank0(lambda: [str(path) for path in find_checkpoints(directory) if step_of(path) < before]):
        path = Path(found[-1])
        if not (problems := verify_checkpoint(path, verify)):
            return path
        aside = on_rank0(partial(_set_aside, directory, path, problems))
        log.get_logger().warning("\n  ".join([f"damaged checkpoint, set aside as {aside}:", *problems]))
    if damaged := on_rank0(lambda: [str(path) for path in find_damaged(directory) if step_of(path) < before]):
        raise CheckpointError(
            f"no whole checkpoint is left in {directory}, only damaged ones: {', '.join(damaged)}; to start anew, "
            "or from elsewhere with checkpoint.resume=<path>, choose another run.name or delete them"
        )
    return None


def last_saved_step(directory: Path, *, before: int = sys.maxsize) -> int:
    """Return the newest step below ``before`` that is recorded as saved and was not rolled back, 0 if none."""
    steps: set[int] = set()
    for event in read_jsonl(directory / EVENTS_FILE) if (directory / EVENTS_FILE).is_file() else ():
        match event:
            case {"event": "start"}:
                steps.clear()
            case {"event": "checkpoint", "step": int(step)}:
                steps.add(step)
            case {"event": "rollback", "first_bad_step": int(first)}:
                steps = {step for step in steps if step < first}
    if not (directory / EVENTS_FILE).is_file():
        ended = read_exit(directory)
        steps = {read_json(directory / ATTEMPT_FILE).get("step", 0)}
        steps |= {ended.get("step", 0)} if ended.get("code") in (EXIT_FINISHED, EXIT_RESUMABLE) else set()
    return max((step for step in steps if step < before), default=0)


def reached_step(directory: Path) -> int:
    """Return the step of the newest complete checkpoint; without one, the newest that was recorded as saved."""
    return newest_step(directory) or last_saved_step(directory)


def _set_aside(directory: Path, path: Path, problems: list[str]) -> str:
    """Rename a damaged checkpoint, record the event, and return the new name."""
    with writing(directory):
        aside = str(set_aside(path))
        events = JsonLines(directory / EVENTS_FILE)
        events.write({"event": "damaged_checkpoint", "path": aside, "problems": problems, "time": now()})
        events.close()
    return aside


def _fitting(config: TrainConfig, path: Path, load: Load) -> Path:
    """Return ``path`` if the run's model and optimizer are those of the checkpoint, by its settings."""
    saved = read_run_state(path).config
    # A setting that did not exist when the checkpoint was saved had its default.
    old, new = to_dict(ModelConfig()) | saved.get("model", {}), to_dict(config.model)
    if old["adapter"]:
        old["adapter"] = to_dict(AdapterConfig()) | old["adapter"]
    if old["rope_scaling"]:
        old["rope_scaling"] = to_dict(RopeScalingConfig(factor=1.0)) | old["rope_scaling"]
    ignored = {"name", "pretrained", "architecture", "settings", "init_from", "dropout", "init_std", "freeze"}
    if load is Load.weights and old["adapter"] is None:  # adapters are added to it
        ignored.add("adapter")
    keys = [key for key in new if key not in ignored and old.get(key) != new[key]]
    if keys:
        was, now = (flatten({key: values.get(key) for key in keys}) for values in (old, new))
        names = [name for name in was | now if was.get(name) != now.get(name)]
        differences = [f"model.{name}: {was.get(name)} in the checkpoint, {now.get(name)} now" for name in names]
        way_out = "choose another run.name" if load is Load.all else "merge its adapters (bigtrain export)"
        problem = f"{path} holds another model; restore that, or {way_out}:"
        raise CheckpointError("\n  ".join([problem, *differences]))
    compares = config.task.kind == TaskKind.preference and config.task.loss.has_reference and not config.data.scores
    if load is Load.weights and old["adapter"] and compares:
        problem = (
            f"checkpoint.resume={path} has adapters, which task.loss={config.task.loss.name} would compare without"
        )
        raise ConfigError(f"{problem}; begin with what bigtrain export has merged, or give data.scores of that run")
    new = to_dict(config.optimizer)
    old, difference = new | saved.get("optimizer", {}), None
    if old["kind"] != new["kind"]:
        difference = f"optimizer.kind: {old['kind']} in the checkpoint, {new['kind']} now"
    elif new["kind"] == "sgd" and (old["betas"][0] > 0) != (new["betas"][0] > 0):
        difference = f"optimizer.betas[0]: {old['betas'][0]} in the checkpoint, {new['betas'][0]} now"
    elif (average := saved.get("optimizer", {}).get("average")) != new["average"]:
        difference = f"optimizer.average: {average} in the checkpoint, {new['average']} now"
    if load is Load.all and difference:  # it has other state tensors
        raise CheckpointError(
            f"{path} holds the state of another optimizer ({difference}); restore that, or let another run.name begin with "
            f"its weights: checkpoint.resume={path} checkpoint.load=weights"
        )
    return path
