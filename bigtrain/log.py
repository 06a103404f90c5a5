"""Messages to people, without secrets: rank 0 speaks, the others only when something is wrong."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

MASK = "***"
_REPORT_SECONDS = 10.0

_SECRET_WORDS = (
    r"password|passwd|pwd|secret|secrets|(?<!per_)token|credential|credentials|authorization"
    r"|api_?key|apikey|access_?key|access_key_id|secret_key|private_?key|account_?key|signature"
)
# A whole word of the name must match: `hf_token` is a secret, `num_tokens`, `tokenizer` and `flops_per_token` are not.
_SECRET_NAME = re.compile(rf"(?:^|[_\-. ])(?:{_SECRET_WORDS})(?:$|[_\-. ])", re.IGNORECASE)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_SECRET_VALUES = (
    (re.compile(r"([a-z][a-z0-9+.\-]*://)[^/\s@]+@", re.IGNORECASE), rf"\g<1>{MASK}@"),  # user:password@ in a URL
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),  # AWS access key id
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), MASK),  # Hugging Face
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,})"), MASK),  # GitHub, GitLab
    (re.compile(r"\b(?:sk|xox[abps])-[\w\-]{16,}"), MASK),  # OpenAI, Anthropic, Slack
    (re.compile(r"\bwandb_v\d_\w{16,}"), MASK),  # Weights & Biases; its older form is known from the environment only
    (re.compile(r"\bAIza[\w\-]{30,}"), MASK),  # Google
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/\-]{8,}=*", re.IGNORECASE), rf"\g<1> {MASK}"),
    (re.compile(r"\beyJ[\w\-]{8,}\.eyJ[\w\-]{8,}\.[\w\-]*"), MASK),  # JSON web token
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), MASK),
    # NAME=value and --name=value, also in the query of a signed URL (token=, sig=, X-Amz-Signature=)
    (
        re.compile(rf"((?:^|[\s?&;,_\-])(?:[\w\-]*[_\-])?(?:{_SECRET_WORDS}|sig)\s*=\s*)[^\s&;,'\"]+", re.IGNORECASE),
        rf"\g<1>{MASK}",
    ),
)
_NOT_SECRET = ("PWD", "OLDPWD")  # the shell's working directories, not passwords
_SHORTEST_SECRET = 8  # a shorter value of an environment variable would mask ordinary words


class Formatter(logging.Formatter):
    """Takes secrets out of messages: errors of other people's libraries quote whole URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def get_logger() -> logging.Logger:
    return logging.getLogger("bigtrain")


def _is_without(text: str, record: logging.LogRecord) -> bool:
    return text not in str(record.msg)


def quiet_torchao() -> None:
    """Drop what importing torchao says: that kernels not used here are of other machines, and what torch has deprecated."""
    for name, text in (("torchao", "Failed to load"), ("torch.utils._pytree", "is an Enum subclass")):
        logging.getLogger(name).addFilter(partial(_is_without, text))


def setup(rank: int) -> None:
    """Send the project's log to standard error; ranks other than 0 show errors only."""
    logger = get_logger()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(Formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False


@contextmanager
def reporter(title: str, total_bytes: int | None, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that is called with each number of bytes done and shows the progress."""
    if progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda num_bytes: bar.advance(task, num_bytes)
    else:
        done_bytes, due = 0, time.monotonic() + _REPORT_SECONDS
        total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""

        def advance(num_bytes: int) -> None:
            nonlocal done_bytes, due
            done_bytes += num_bytes
            if time.monotonic() >= due:
                get_logger().info("%s: %.0f%s MB", title, done_bytes / 1e6, total)
                due = time.monotonic() + _REPORT_SECONDS

        yield advance


def redact(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Return a copy of plain data (dicts, lists, scalars) in which secrets are replaced by ``***``.

    Secrets are values under telling keys (``password``, ``hf_token``, ``apiKey`` ...), texts of known forms (keys of
    AWS, Hugging Face, GitHub ..., ``user:password@`` in URLs, signed URLs), and every occurrence of the value of a
    variable of ``environ``, by default this process's, with a telling name, such as ``WANDB_API_KEY``.
    """
    environ = os.environ if environ is None else environ
    known = {v for k, v in environ.items() if k not in _NOT_SECRET and is_secret_name(k) and len(v) >= _SHORTEST_SECRET}
    return _redact(value, sorted(known, key=len, reverse=True))


def is_secret_name(name: str) -> bool:
    """Return whether a key or an environment variable of this name holds a secret."""
    return _SECRET_NAME.search(_CAMEL_CASE.sub("_", name)) is not None


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _redact_entry(k, v, known) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(item, known) for item in value]
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, MASK)
        for pattern, replacement in _SECRET_VALUES:
            value = pattern.sub(replacement, value)
    return value


def _redact_entry(key: Any, value: Any, known: list[str]) -> Any:
    if is_secret_name(str(key)) and value is not None and not isinstance(value, bool) and value != "":
        return MASK
    return _redact(value, known)
