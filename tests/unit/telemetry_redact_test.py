"""Secrets never leave the process through configurations, files or trackers."""

import json
from pathlib import Path

import pytest

from bigtrain import log
from bigtrain.config import TrainConfig
from bigtrain.config.convert import to_dict
from bigtrain.log import is_secret_name, redact
from bigtrain.supervise.attempt import write_exit
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.recorder import Recorder

CANARIES = {
    "url": "https://alice:CANARYpw1@host.example/x",
    "url_token_as_user": "https://CANARYghp@github.com/a/b.git",
    "s3": "s3://AKIACANARYCANARYCAN1:CANARYpw2@bucket/key",
    "aws_id": "use AKIACANARYCANARYCAN1 here",
    "hf": "hf_CANARYCANARYCANARYCANARYCANARY",
    "github": "ghp_CANARY00000000000000000000000000000000",
    "openai": "sk-proj-CANARY0000000000000000",
    "wandb": "wandb_v1_CANARY0000000000000000000",
    "bearer": "Authorization: Bearer CANARY.abcdefgh",
    "jwt": "eyJCANARY00000.eyJCANARY11111.CANARY22222",
    "presigned": "https://h/x?X-Amz-Signature=CANARYsig&X-Amz-Credential=CANARYcred&v=1",
    "sas": "https://h/x?sv=1&sig=CANARYsig%3D",
    "assignment": "run WANDB_API_KEY=CANARY1 train.py --hf-token=CANARY2 password=CANARY3",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nCANARY\nCANARY\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("text", CANARIES.values(), ids=CANARIES.keys())
def test_secret_texts_are_masked_wherever_they_are(text: str) -> None:
    redacted = json.dumps(redact({"a": [{"b": text}], "c": (text,)}, environ={}))
    assert "CANARY" not in redacted
    assert "***" in redacted


@pytest.mark.parametrize(
    "key",
    ["password", "hf_token", "HF_TOKEN", "apiKey", "api_key", "aws_secret_access_key", "db.password", "Credentials"],
)
def test_values_under_secret_keys_are_masked(key: str) -> None:
    assert redact({"x": {key: "CANARY"}}, environ={}) == {"x": {key: "***"}}
    assert redact({key: {"nested": ["CANARY"]}}, environ={}) == {key: "***"}
    assert redact({key: None}, environ={}) == {key: None}


def test_values_of_secret_environment_variables_are_masked_in_any_text() -> None:
    key = "0123456789abcdef0123456789abcdef01234567"  # an old wandb key looks like a git commit
    assert redact({"note": f"<{key}>"}, environ={"WANDB_API_KEY": key}) == {"note": "<***>"}
    assert redact({"commit": key}, environ={}) == {"commit": key}


def test_ordinary_settings_are_untouched() -> None:
    config = to_dict(TrainConfig())
    config["data"].update(
        path="s3://bucket/books/*.jsonl", tokenizer="org/tokenizer", text_field="text", root="/home/token/data"
    )
    assert redact(config, environ={}) == config
    plain = {"num_tokens": 5, "tokenizer": "bpe", "bucket_elements": 3, "mail": "a@b.example", "f": "keys=3 monkey=x"}
    assert redact(plain, environ={"HF_TOKEN": "", "PATH": "/usr/bin", "MY_TOKEN": "short"}) == plain


@pytest.mark.parametrize(
    "name",
    ["tokens", "tokens_per_second", "causal_flops_per_token", "tokenizer", "secretary", "keyboard", "passwordless"],
)
def test_names_that_only_contain_a_secret_word_are_not_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_the_working_directory_is_no_secret():
    environ = {"PWD": "/home/me/project", "OLDPWD": "/home/me/else", "DB_PWD": "correct-horse"}
    text = "/home/me/project/data and /home/me/else, correct-horse"
    assert redact(text, environ) == "/home/me/project/data and /home/me/else, ***"


def test_what_is_logged_shown_and_recorded_has_no_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "cannot read https://user:CANARY@host/shard?X-Amz-Signature=CANARY"
    log.setup(0)
    log.get_logger().warning("%s; trying again", text)
    with Console(10, tmp_path / "train.log", is_terminal=False):
        log.get_logger().warning("%s; trying again", text)
    with Recorder(TrainConfig(), tmp_path, 0) as recorder:
        recorder.event("fault", step=1, error=text)
        recorder.message(text)
    write_exit(tmp_path, code=2, reason=text, step=1, attempt=1)
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    said = [*capsys.readouterr(), *files]
    assert sum("host/shard" in part for part in said) == 6  # both streams, two logs, events and exit.json
    assert not any("CANARY" in part for part in said)
