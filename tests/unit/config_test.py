import dataclasses
import functools
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from bigtrain import config as config_module
from bigtrain.cli import hydra_cli
from bigtrain.cli.generate import GenerateConfig
from bigtrain.cli.settings import settings
from bigtrain.config import EngineKind, RopeScalingConfig, TrainConfig
from bigtrain.config.bounds import Bound, OnlyIf, metadata, out_of_bounds, without_effect
from bigtrain.config.check import check, ignored_settings, resolve
from bigtrain.config.convert import (
    from_dict,
    key_docs,
    key_types,
    nearest,
    nearest_key,
    to_dict,
    type_hints,
    value_problems,
)
from bigtrain.config.foreign import OTHERWISE, OURS
from bigtrain.config.layout import padding
from bigtrain.data.prepare.files import find_files
from bigtrain.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parents[2]


def compose(*args: str) -> TrainConfig:
    return hydra_cli.compose(TrainConfig, list(args), config_name="train")[0]


def changed(**values: Any) -> TrainConfig:
    """Return the resolved defaults with ``section__key=value`` changed."""
    data = to_dict(TrainConfig())
    for key, value in values.items():
        section, _, name = key.partition("__")
        data[section][name] = value
    return resolve(from_dict(TrainConfig, data))


def problems(*, world_size: int = 1, local_world_size: int = 1, **values: Any) -> list[str]:
    return check(changed(**values), world_size=world_size, local_world_size=local_world_size)


CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in (REPOSITORY / "configs").glob("*/*.yaml"))
CHOICES = [choice for choice in CHOICES if not choice.startswith("cluster=")]  # of another schema
PLAIN_CHOICES = [
    choice for choice in CHOICES if not choice.startswith(("model=", "adapter=", "articles=", "experiment=", "recipe="))
]


# Dataclasses


def test_every_field_of_every_dataclass_is_explained():
    classes = [c for name, c in vars(config_module).items() if name.endswith("Config")]
    assert len(classes) >= 14
    fields = {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c)}
    documented = {f"{c.__name__}.{name}" for c in classes for name, text in key_docs(c).items() if text.strip()}
    assert fields <= documented
    assert key_docs(TrainConfig).keys() == key_types(TrainConfig).keys()


def test_a_field_without_explanation_is_found():
    @dataclasses.dataclass
    class Half:
        first: int = 0
        """Explained."""
        second: int = 0

    assert set(key_docs(Half)) == {"first"}


def test_plain_data_and_back_is_the_same():
    config = TrainConfig()
    config.model.rope_scaling = RopeScalingConfig(factor=8.0)
    config.engine.kind = EngineKind.zero3
    config.optimizer.betas = [0.8, 0.99]
    values = to_dict(config)
    assert values["engine"]["kind"] == "zero3"
    assert from_dict(TrainConfig, values) == config
    assert from_dict(TrainConfig, {}) == TrainConfig() != config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stpes": 1}}, "train.stpes: unknown key; did you mean 'train.steps'?"),
        ({"optimiser": {"lr": 1.0}}, "optimiser: unknown key; did you mean 'optimizer'?"),
        ({"engine": {"kind": "fdsp"}}, "engine.kind: unknown value 'fdsp'; did you mean 'fsdp'?"),
        ({"engine": {"kind": ["fsdp"]}}, "engine.kind: unknown value ['fsdp']"),
        ({"train": {"steps": "many"}}, "train.steps: expected int, got 'many'"),
        ({"train": {"steps": 1.5}}, "train.steps: expected int, got 1.5"),
        ({"train": {"steps": True}}, "train.steps: expected int, got True"),
        ({"train": {"steps": None}}, "train.steps: expected int, got None"),
        ({"engine": {"compile": 1}}, "engine.compile: expected bool, got 1"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas: expected a list, got 0.9"),
        ({"optimizer": {"betas": [0.9, "b"]}}, "optimizer.betas[1]: expected float, got 'b'"),
        ({"train": 5}, "train: expected a section with keys, got 5"),
        ({"model": {"rope_scaling": {}}}, "model.rope_scaling.factor: missing"),
    ],
)
def test_wrong_data_is_refused_with_the_way_out(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_floats_where_floats_are_meant():
    assert from_dict(TrainConfig, {"optimizer": {"lr": 1}}).optimizer.lr == 1.0


def test_all_wrong_keys_and_types_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, {"train": {"stpes": 1, "seed": "x"}, "data": 3, "foo": 1})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.stpes", "train.steps"),
        ("optimiser.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("steps", "train.steps"),
        ("seed", "train.seed"),
        ("train.warmup_steps", "scheduler.warmup_steps"),
        ("engin", "engine"),
        ("precision", "engine.precision"),
    ],
)
def test_the_nearest_key_is_looked_for_everywhere(key: str, expected: str):
    assert nearest_key(key, list(key_types(TrainConfig))) == f"did you mean '{expected}'?"


def test_without_a_near_name_the_valid_ones_are_listed():
    assert nearest("xyz", ["fsdp", "ddp"]) == "choose one of: fsdp, ddp"
    assert nearest_key("train.zzz", list(key_types(TrainConfig))).startswith("choose one of: train.seed, train.steps")


# Config files


@pytest.mark.parametrize("choice", CHOICES)
def test_every_group_file_composes(choice: str):
    group, _, name = choice.partition("=")
    config = compose(choice if choice in PLAIN_CHOICES else f"+{choice}")
    kind = {"data": config.data.source, "engine": config.engine.kind, "scheduler": config.scheduler.kind}.get(group)
    assert kind is None or kind.name == {"mixture": "jsonl", "digits": "images", "fashion_mnist": "images"}.get(
        name, name
    )


@pytest.mark.parametrize("choice", PLAIN_CHOICES)
def test_group_files_hold_only_what_differs_from_the_defaults(choice: str):
    group, _, name = choice.partition("=")
    values = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "configs" / group / f"{name}.yaml"))
    defaults = to_dict(getattr(TrainConfig(), group))
    assert [k for k in list(values)[1:] if values[k] == defaults[k]] == []


def test_the_primary_file_composes_the_defaults_of_the_dataclasses():
    assert to_dict(compose()) == to_dict(TrainConfig())


def test_the_primary_file_repeats_no_default():
    assert list(OmegaConf.load(REPOSITORY / "configs" / "train.yaml")) == ["defaults"]


def test_experiments_never_choose_the_model():
    for path in (REPOSITORY / "configs" / "experiment").glob("*.yaml"):
        assert "\nmodel:" not in path.read_text() and "/model" not in path.read_text()


def test_the_command_line_beats_experiments_and_groups():
    config = compose("+experiment=demo", "train.steps=7", "scheduler=wsd", "engine=zero2")
    assert (config.train.steps, config.scheduler.kind.name, config.run.name) == (7, "wsd", "demo")


# Derived values


def test_resolve_fills_in_what_follows_and_leaves_the_original_alone():
    config = TrainConfig()
    config.model.name = "org/Some Model"
    resolved = resolve(config)
    assert (resolved.model.num_kv_heads, resolved.model.head_dim, resolved.model.ffn_dim) == (4, 32, 512)
    assert resolved.data.sequence_length == config.model.max_positions
    assert resolved.run.name == "Some-Model"
    assert config.model.ffn_dim is config.run.name is config.data.sequence_length is None


# Contradictions

WRONG: dict[str, dict[str, Any]] = {
    "train.global_batch_size=0: must be at least 1": dict(train__global_batch_size=0),
    "model.hidden_dim=130 does not divide by model.num_heads=4": dict(model__hidden_dim=130),
    "model.num_heads=4 does not divide by model.num_kv_heads=3": dict(model__num_kv_heads=3),
    "model.num_layers=0": dict(model__num_layers=0),
    "model.head_dim=31: rotary": dict(model__head_dim=31, model__positions="rope"),
    "model.head_dim=0": dict(model__head_dim=0),
    "model.head_dim=-1": dict(model__head_dim=-1),
    "model.num_kv_heads=0": dict(model__num_kv_heads=0),
    "model.ffn_dim=0": dict(model__ffn_dim=0),
    "model.hidden_dim=3 does not divide by model.num_heads=4": dict(model__hidden_dim=3),
    "model.rope_scaling.factor=0.0": dict(model__rope_scaling=dict(factor=0.0)),
    "model.rope_scaling.low_freq_factor=0.0": dict(model__rope_scaling=dict(factor=8.0, low_freq_factor=0.0)),
    "model.rope_scaling.high_freq_factor=1.0: must be more than low_freq_factor=1.0": dict(
        model__rope_scaling=dict(factor=8.0, high_freq_factor=1.0)
    ),
    "engine.dp_shard=0": dict(engine__dp_shard=0),
    "engine.deepspeed.bucket_elements=0": dict(engine__deepspeed=dict(bucket_elements=0)),
    "engine.deepspeed.persistence_threshold_elements=-5": dict(
        engine__deepspeed=dict(persistence_threshold_elements=-5)
    ),
    "model.dropout=1.0": dict(model__dropout=1.0),
    "model.name: +model=hf needs": dict(model__kind="hf"),
    "model.vocab_size=300 is smaller than data.tokenizer_vocab_size=4096": dict(model__vocab_size=300),
    "model.vocab_size=256 is smaller than the 257 ids of data.tokenizer=bytes": dict(
        model__vocab_size=256, data__tokenizer="bytes"
    ),
    "data.sequence_length=257 is longer than model.max_positions=256": dict(data__sequence_length=257),
    "data.sequence_length=-1": dict(data__sequence_length=-1),
    "data.path: missing; data=text needs": dict(data__source="text"),
    "data.validation_fraction=1.0": dict(data__validation_fraction=1.0),
    "data.tokenizer_vocab_size=100": dict(data__tokenizer_vocab_size=100),
    "data.prefetch_steps=0": dict(data__prefetch_steps=0),
    "engine.dp_shard=3 does not divide": dict(
        world_size=4, local_world_size=2, engine__kind="hsdp", engine__dp_shard=3
    ),
    "engine.offload=cpu is not offered by engine=ddp": dict(engine__kind="ddp", engine__offload="cpu"),
    "engine.activation_checkpointing_every=0": dict(engine__activation_checkpointing_every=0),
    "run.name='a/b'": dict(run__name="a/b"),
    "run.name='..'": dict(run__name=".."),
    "run.stop_after_steps=0": dict(run__stop_after_steps=0),
    "train.seed=-1": dict(train__seed=-1),
    "train.steps=0": dict(train__steps=0),
    "train.log_every_steps=0": dict(train__log_every_steps=0),
    "optimizer.lr=0.0": dict(optimizer__lr=0.0),
    "optimizer.lr=nan": dict(optimizer__lr=float("nan")),
    "optimizer.eps=0.0": dict(optimizer__eps=0.0),
    "optimizer.weight_decay=-0.1": dict(optimizer__weight_decay=-0.1),
    "optimizer.grad_clip=-1.0": dict(optimizer__grad_clip=-1.0),
    "optimizer.betas=[0.9]": dict(optimizer__betas=[0.9]),
    "scheduler.warmup_steps=-1": dict(scheduler__warmup_steps=-1),
    "scheduler.min_lr_ratio=2.0": dict(scheduler__min_lr_ratio=2.0),
    "scheduler.decay_fraction=1.5": dict(scheduler__kind="wsd", scheduler__decay_fraction=1.5),
    "validation.every_steps=-1": dict(validation__every_steps=-1),
    "validation.batches=0": dict(validation__batches=0),
    "validation.written_samples: task=causal_lm": dict(validation__every_steps=1, validation__written_samples=3),
    "checkpoint.every_steps=-1": dict(checkpoint__every_steps=-1),
    "checkpoint.keep='latest 0'": dict(checkpoint__keep="latest 0"),
}


@pytest.mark.parametrize("message", WRONG)
def test_each_contradiction_is_found_alone(message: str):
    found = problems(**WRONG[message])
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(world_size=8, local_world_size=4, engine__kind="hsdp"),
        dict(world_size=4, engine__kind="hsdp", engine__dp_shard=2),
        dict(engine__kind="zero3", engine__offload="cpu"),
        dict(model__head_dim=48),
        dict(model__hidden_dim=130, model__head_dim=48),
        dict(model__kind="hf", model__name="gpt2", data__sequence_length=1024),
        dict(model__vocab_size=300, data__source="synthetic"),
        dict(model__vocab_size=300, data__tokenizer="bytes"),
        dict(train__global_batch_size=6, train__micro_batch_size=3, world_size=2),
        dict(optimizer__grad_clip=0.0, validation__every_steps=0, checkpoint__keep="all"),
    ],
)
def test_what_fits_together_is_accepted(values: dict[str, Any]):
    assert problems(**values) == []


def test_padding_is_told_where_it_is_more_than_a_percent():
    train = TrainConfig().train
    train.global_batch_size, train.micro_batch_size = 8, 2
    assert padding(train, 4) == padding(train, 1) == []
    assert padding(train, 3)[0].startswith(
        "33% of the computing is padding: 3 ranks with micro-batches of 2 have 12 places"
    )
    train.global_batch_size, train.micro_batch_size = 1000, 1
    assert padding(train, 3) == [], "2 of 1002 places"


def test_all_contradictions_are_reported_in_one_pass():
    values: dict[str, Any] = dict(train__steps=0, optimizer__lr=-1.0, data__source="text", model__hidden_dim=130)
    hsdp = dict(engine__kind="hsdp", engine__dp_shard=2)
    assert len(problems(world_size=3, **values, **hsdp)) == 5


# Ignored settings


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (dict(engine__kind="zero1", engine__fsdp={"reshard_after_forward": False}), "engine.fsdp"),
        (dict(engine__deepspeed={"bucket_elements": 1}), "engine.deepspeed"),
        (dict(engine__dp_shard=2), "engine.dp_shard"),
        (dict(engine__activation_checkpointing_every=2), "engine.activation_checkpointing_every"),
        (dict(data__path="x"), "data.path"),
        (dict(data__split="test"), "data.split"),
        (dict(data__subset="en"), "data.subset"),
        (dict(data__synthetic_ragged=True), "data.synthetic_ragged"),
        (dict(data__tokenizer="bytes", data__tokenizer_vocab_size=500), "data.tokenizer_vocab_size"),
        (dict(model__pretrained=True), "model.pretrained"),
        (dict(scheduler__decay_fraction=0.5), "scheduler.decay_fraction"),
        (dict(validation__batches=2), "validation.batches"),
    ],
)
def test_a_changed_setting_that_has_no_effect_is_named(values: dict[str, Any], key: str):
    warnings = ignored_settings(changed(**values))
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{key} is ignored")


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(engine__fsdp={"reshard_after_forward": False}),
        dict(engine__kind="zero2", engine__deepspeed={"bucket_elements": 1}),
        dict(engine__kind="hsdp", engine__dp_shard=2),
        dict(engine__activation_checkpointing="full", engine__activation_checkpointing_every=2),
        dict(data__source="text", data__path="x"),
        dict(data__source="datasets", data__path="x", data__split="test", data__subset="en"),
        dict(data__source="synthetic", data__synthetic_ragged=True),
        dict(model__kind="hf", model__name="gpt2", model__pretrained=True),
        dict(scheduler__kind="wsd", scheduler__decay_fraction=0.5),
        dict(validation__every_steps=5, validation__batches=2),
    ],
)
def test_settings_in_use_are_not_warned_about(values: dict[str, Any]):
    assert ignored_settings(changed(**values)) == []


# Paths and numbers from a person


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("run.root=s3://bucket/runs", "run.root=s3://bucket/runs: a URL"),
        ("run.root=gs:/bucket", "run.root=gs:/bucket: a URL"),
        ("run.root=simplecache::s3://bucket", "run.root=simplecache::s3://bucket: a URL"),
        ("data.root=me@node1:/data", "data.root=me@node1:/data: a URL or another machine"),
        ("data.root=https://host/data", "data.root=https://host/data: a URL"),
        ("data.cache_directory=s3://b", "data.cache_directory=s3://b: a URL"),
        ("data.tokenizer=hf://gpt2", "data.tokenizer=hf://gpt2: a URL"),
        ("model.init_from=https://huggingface.co/gpt2", "model.init_from=https://huggingface.co/gpt2: a URL"),
        ("checkpoint.resume=gs://b/run", "checkpoint.resume=gs://b/run: a URL"),
        ("run.root=${oc.env:NO_SUCH}/runs", "run.root=${oc.env:NO_SUCH}/runs: the environment variable NO_SUCH"),
        ("data.path=$NO_SUCH/x", "data.path=$NO_SUCH/x: the environment variable NO_SUCH is not set"),
        ("run.root=${now:%Y}", "run.root=${now:%Y}: of what is in ${ } only environment variables"),
        ("run.root=~nobody_of_that_name/x", "run.root=~nobody_of_that_name/x: there is no such home directory"),
        ("optimizer.lr=inf", "optimizer.lr=inf: must be a finite number"),
        ("optimizer.weight_decay=1e400", "optimizer.weight_decay=inf: must be a finite number"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas[1]=nan: must be a finite number"),
        ("data.mixture.web.weight=inf", "data.mixture.web.weight=inf: must be a finite number"),
        ("run.max_minutes=inf", "run.max_minutes=inf: must be a finite number"),
    ],
)
def test_what_is_no_path_on_this_machine_and_no_number_is_refused_by_name(
    setting: str, problem: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError) as caught:
        compose(setting)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", " "])
def test_every_text_refuses_to_be_empty_as_an_unset_variable_is(text: str):
    keys = [key for key, hint in key_types(TrainConfig).items() if hint in (str, str | None) and "*" not in key]
    assert {"run.name", "run.root", "model.init_from", "data.tokenizer", "checkpoint.resume"} <= set(keys)
    for key in keys:
        values: Any = text
        for name in reversed(key.split(".")):
            values = {name: values}
        with pytest.raises(ConfigError, match=rf"^{key}: empty, as a variable that is not set"):
            from_dict(TrainConfig, values, from_user=True)
        from_dict(TrainConfig, values)  # a run of before opens


def test_a_path_from_an_empty_variable_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOTHING", "")
    with pytest.raises(ConfigError, match="the environment variable is empty"):
        compose("model.init_from=${oc.env:NOTHING}")


def test_a_prompt_may_be_empty():
    assert hydra_cli.read(GenerateConfig, ["checkpoint=x", "prompt="]).prompt == ""


def test_every_whole_number_has_bounds():
    keys = [key for key, hint in key_types(TrainConfig).items() if hint in (int, int | None) and "*" not in key]
    scaling = {"model": {"rope_scaling": {"factor": 8.0}, "adapter": {}, "moe": {"num_experts": 2, "expert_dim": 8}}}
    for key in keys:
        for number, bound in ((10**20, r"at most \d+"), (-1, r"at least \d+")):
            config = from_dict(TrainConfig, scaling)
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, config), name, number)
            (found,) = out_of_bounds(config)
            assert re.fullmatch(rf"{key}={number}: must be {bound}", found)
    with pytest.raises(ConfigError, match="num_samples=99999999999: must be at most 10000"):
        hydra_cli.read(GenerateConfig, ["checkpoint=x", "prompt=a", "num_samples=99999999999"])


def test_a_setting_needs_one_place_only():
    @dataclasses.dataclass
    class Section:
        kind: EngineKind = EngineKind.fsdp
        """Explained."""
        shares: Annotated[list[float], Bound(gt=0, le=1), OnlyIf("kind", is_in=("hsdp",))] = dataclasses.field(
            default_factory=list
        )
        """Explained."""

    assert out_of_bounds(Section(shares=[0.5, 1.0])) == []
    assert out_of_bounds(Section(shares=[0.5, 0.0]), "a.") == ["a.shares[1]=0.0: must be more than 0"]
    assert out_of_bounds(Section(shares=[float("nan")])) == ["shares[0]=nan: must be more than 0"]
    assert without_effect(Section(shares=[0.5]), "a.") == ["a.shares is ignored by a.kind=fsdp"]
    assert without_effect(Section(shares=[0.5], kind=EngineKind.hsdp)) == without_effect(Section()) == []
    assert list(settings(Section))[1][:3] == (
        "shares",
        "list of float, more than 0, at most 1, only with kind=hsdp",
        "[]",
    )


def test_conditions_name_settings_and_values_that_there_are():
    classes = [c for name, c in vars(config_module).items() if name.endswith("Config")]
    conditions = [(c, m) for c in classes for h in type_hints(c).values() for m in metadata(h) if isinstance(m, OnlyIf)]
    assert len(conditions) > 30
    for section, condition in conditions:
        for value in (*condition.is_in, *condition.not_in):
            assert value_problems(section, condition.name, value) == []


@pytest.mark.parametrize("model", ["gpt_nano", "llama3_1b"])
def test_a_key_of_a_section_that_may_be_null_is_set_whether_it_is_null_or_not(model: str):
    args = ["model.rope_scaling.low_freq_factor=2", "model.rope_scaling.factor=8"]
    for given in (args, args[::-1], ["model.rope_scaling={factor: 8, low_freq_factor: 2}"]):
        scaling = hydra_cli.compose_run(TrainConfig, [f"+model={model}", *given]).model.rope_scaling
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (8.0, 2.0, 4.0)
    for wrong, problem in (("foo=2", "foo: unknown key"), ("factor=abc", "factor: expected float, got 'abc'")):
        with pytest.raises(ConfigError, match=rf"^model.rope_scaling.{problem}"):
            compose(f"model.rope_scaling.{wrong}")


def test_every_setting_that_takes_a_path_expands_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = compose(
        "run.root=~/runs",
        "data.root=${oc.env:SCRATCH}/data",
        "data.cache_directory=$SCRATCH",
        "data.path=${SCRATCH}/*.txt",
        "data.mixture.web.path=~/web",
        "data.tokenizer=${oc.env:NO_SUCH,~/tokenizer}",
        "model.name=~/model",
        "checkpoint.resume=~/runs/a",
    )
    assert (config.run.root, config.data.root) == ("/home/me/runs", "/scratch/data")
    assert (config.data.cache_directory, config.data.path) == ("/scratch", "/scratch/*.txt")
    assert config.data.mixture["web"].path == "/home/me/web"
    assert (config.data.tokenizer, config.model.name) == ("/home/me/tokenizer", "/home/me/model")
    assert config.checkpoint.resume == "/home/me/runs/a"


def test_a_name_that_exists_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("cash", raising=False)
    for name in ("a$cash", "~draft"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert compose("data.path=a$cash").data.path == "a$cash"
    assert compose("data.path=~draft").data.path == "~draft"
    assert compose("data.path=./s3:/x").data.path == "./s3:/x"


def test_what_a_run_has_recorded_is_taken_as_it_is():
    config = from_dict(TrainConfig, {"run": {"root": "s3://x"}, "optimizer": {"lr": float("inf")}})
    assert (config.run.root, config.optimizer.lr) == ("s3://x", float("inf"))


def test_only_a_prepared_corpus_is_read_from_a_url():
    assert problems(data__source="jsonl", data__path="s3://b/x")[0].startswith("data.path=s3://b/x: a URL, which only")
    assert problems(data__source="prepared", data__path="s3://b/x") == []


def test_an_eps_that_is_0_in_fp32_is_refused():
    assert problems(optimizer__eps=1e-50) == ["optimizer.eps=1e-50: must be at least 1.2e-38"]
    assert problems(optimizer__eps=1e-37) == []


@pytest.mark.parametrize(("warmup", "is_reached"), [(4, True), (5, False)])
def test_a_peak_that_is_never_reached_is_told(warmup: int, is_reached: bool):
    found = ignored_settings(changed(train__steps=4, scheduler__warmup_steps=warmup))
    assert any("is never reached" in warning for warning in found) is not is_reached


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "3", "PMI_SIZE": "4"},
    ],
)
def test_ranks_that_do_not_know_of_each_other_are_refused(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a run of its own: let it start one torchrun per node"):
        hydra_cli.read_run(["+model=gpt_nano"])
    monkeypatch.setenv("RANK", "0")
    hydra_cli.read_run(["+model=gpt_nano"])


def test_one_task_of_a_job_of_several_trains_by_itself(monkeypatch: pytest.MonkeyPatch):
    # A batch script without srun, and a step of one task.
    for environ in ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        hydra_cli.read_run(["+model=gpt_nano"])


def test_names_of_other_programs_are_understood_in_errors():
    assert set(OURS.values()) <= key_types(TrainConfig).keys() and not OURS.keys() & key_types(TrainConfig).keys()
    for given, ours in (
        ("per_device_train_batch_size=4", "train.micro_batch_size"),
        ("+train.num_train_epochs=3", "train.epochs"),
        ("lora_r=8", "model.adapter.rank"),
    ):
        with pytest.raises(ConfigError, match=f"unknown key; here that is '{ours}'"):
            compose(given)
    assert not OTHERWISE.keys() & (key_types(TrainConfig).keys() | OURS.keys())
    for name, told in OTHERWISE.items():
        with pytest.raises(ConfigError, match=f"{name}: unknown key; {re.escape(told)}"):
            compose(f"+train.{name}=0.1")


def test_several_paths_are_a_pattern_or_a_mixture():
    told = r"data\.path: one path, .* is meant, got \['a\.jsonl', 'b\.jsonl'\]; several are a pattern"
    with pytest.raises(ConfigError, match=told):
        from_dict(TrainConfig, {"data": {"path": ["a.jsonl", "b.jsonl"]}})
    for path in ("[a.jsonl,b.jsonl]", "{a,b}.jsonl", "part-?.jsonl"):
        with pytest.raises(DataError, match="no such file") as raised:
            find_files(compose("data=jsonl", f"data.path={path}").data)
        assert ("several are a pattern" in str(raised.value)) is ("part" not in path)
