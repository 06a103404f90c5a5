"""The safetensors files of a model of transformers: what is in them, and whether they are whole."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bigtrain.errors import ConfigError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights; smaller ones need a scale that is written elsewhere."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file, of which only the rows asked for are read."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str = "F32"

    def read(self) -> Tensor:
        """Return the whole tensor in its own type."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt", device="cpu") as file:
            return file.get_tensor(self.key)

    def fill(self, start: int, out: Tensor) -> None:
        """See :class:`InitialValue`."""
        from safetensors import safe_open

        stop, row = start + out.numel(), math.prod(self.shape[1:])
        with safe_open(self.path, framework="pt", device="cpu") as file:
            first = start // row
            rows = file.get_slice(self.key)[first : -(-stop // row)] if self.shape else file.get_tensor(self.key)
            out.copy_(rows.flatten()[start - first * row : stop - first * row])


def stored_tensors(name: str, *, setting: str = "model.name") -> dict[str, StoredTensor]:
    """Return every tensor in the safetensors files of ``name``, a hub id or a local directory.

    Raises:
        ConfigError: there are no such files, or one is missing, cut off, or at odds with their index; it names the
            ``setting`` that the name is from.
    """
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(published_directory(name, ["model*.safetensors", INDEX], setting=setting)):
        for tensor in tensors_of(path):
            if tensor.key in stored:
                raise ConfigError(
                    f"{tensor.key} is both in {stored[tensor.key].path} and in {path}; remove one of them"
                )
            stored[tensor.key] = tensor
    return stored


def tensors_of(path: Path) -> list[StoredTensor]:
    """Return every tensor in one safetensors file.

    Raises:
        ConfigError: it is cut off or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            return [StoredTensor(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is cut off or damaged ({error}): its {path.stat().st_size} bytes are not those that its header "
            "announces; copy or download it again"
        ) from error


def _weight_files(directory: Path) -> Iterator[Path]:
    index = directory / INDEX
    names = [WEIGHTS]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            names = ["".join([name]) for name in names]  # nothing but text
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is no index of weight files ({error!r}); copy or download it again") from error
        if WEIGHTS not in names and (directory / WEIGHTS).exists():
            raise ConfigError(
                f"{directory} has both {WEIGHTS} and {INDEX}, which lists other files; remove the one that is old"
            )
    for name in names:
        if not (directory / name).exists():
            raise ConfigError(
                f"{directory} has no {name}; only safetensors files are read: "
                "load the model with transformers and call save_pretrained(<directory>) to make them"
            )
        yield directory / name


def published_directory(name: str | None, patterns: list[str], *, setting: str = "model.name") -> Path:
    """Return a directory with the files of ``name`` (a hub id or a local directory), of the hub's those asked for.

    Raises:
        ConfigError: if they cannot be had; it names the ``setting`` that the name is from.
    """
    from huggingface_hub import snapshot_download

    if Path(str(name)).is_dir():
        return Path(str(name))
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ConfigError(unreadable(name, error, setting=setting)) from error


def unreadable(name: str | None, error: Exception, *, setting: str = "model.name") -> str:
    """Say why a model could not be read from a directory or the hub, and the way out."""
    return (
        f"{setting}={name!r}: neither a directory with a config.json here nor a model that the Hugging Face hub "
        f"hands out ({first_line(error)}); give a local directory, or check the spelling of the hub id; "
        f"without a network, run `hf download {name}` where there is one and copy the directory; "
        "a gated model needs HF_TOKEN"
    )
