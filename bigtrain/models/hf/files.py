"""safetensors files of transformers' models: their tensors, and whether they are whole."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bigtrain.errors import ConfigError, first_line, some

ADAPTER = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
"""Endings of files that hold weights, by other programs or in other forms."""
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights; smaller ones need a scale that is written elsewhere
SHOWN = 6  # names in a message


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file, of which only the rows asked for are read."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str = "F32"

    def read(self) -> Tensor:
        """Return the whole tensor in its own dtype."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt", device="cpu") as file:
            return file.get_tensor(self.key)

    def fill(self, start: int, out: Tensor) -> None:
        from safetensors import safe_open

        stop, row = start + out.numel(), math.prod(self.shape[1:])
        with safe_open(self.path, framework="pt", device="cpu") as file:
            first = start // row
            rows = file.get_slice(self.key)[first : -(-stop // row)] if self.shape else file.get_tensor(self.key)
            out.copy_(rows.flatten()[start - first * row : stop - first * row])


def stored_tensors(name: str, *, setting: str = "model.name") -> dict[str, StoredTensor]:
    """Return every tensor in the files of a hub id or directory; ConfigError if one is missing or cut off."""
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(published_directory(name, ["model*.safetensors", INDEX, ADAPTER], setting=setting))[0]:
        for tensor in tensors_of(path):
            if tensor.key in stored:
                raise ConfigError(
                    f"{tensor.key} is both in {stored[tensor.key].path} and in {path}; remove one of them"
                )
            stored[tensor.key] = tensor
    return stored


def tensors_of(path: Path) -> list[StoredTensor]:
    """Return every tensor in one safetensors file; ConfigError if it is cut off or damaged."""
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


def weight_files(directory: Path) -> tuple[list[Path], list[str]]:
    """Return a model's weight files, and other ones beside them; ConfigError: none, missing, or of an adapter."""
    refuse_adapter(directory)
    index, names = directory / INDEX, [WEIGHTS]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            names = ["".join([name]) for name in names]  # nothing but text
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is no index of weight files ({error!r}); copy or download it again") from error
    others = sorted(path.name for path in directory.iterdir() if path.suffix in OF_WEIGHTS and path.name not in names)
    if WEIGHTS in others:
        raise ConfigError(
            f"{directory} has both {WEIGHTS} and {INDEX}, which lists other files; remove the one that is old"
        )
    if missing := [name for name in names if not (directory / name).is_file()]:
        found = f", only {some(others, SHOWN)}" if others else ""
        if index.exists():
            lost = some(missing, SHOWN)
            raise ConfigError(f"{directory} has no {lost}, which {INDEX} lists; copy or download it again")
        if any(name.startswith("model-") and name.endswith(".safetensors") for name in others):
            raise ConfigError(f"{directory} has neither {WEIGHTS} nor {INDEX}{found}; copy or download the index again")
        raise ConfigError(
            f"{directory} has no {WEIGHTS}{found}; only safetensors files are read: "
            "load the model with transformers and call save_pretrained(<directory>) to make them"
        )
    return [directory / name for name in names], others


def refuse_adapter(directory: Path) -> None:
    """Raise a ConfigError if a directory has an adapter, which transformers would apply to the weights."""
    if (directory / ADAPTER).is_file():
        raise ConfigError(
            f"{directory} has an adapter ({ADAPTER}), and adapters are not applied here; load it with peft, call "
            "merge_and_unload() and save_pretrained(<directory>) and give that, or remove the adapter's files where weights "
            "without it are meant"
        )


def published_directory(name: str | None, patterns: list[str], *, setting: str = "model.name") -> Path:
    """Return a directory with the files of ``name``, a local directory or a hub id (those that match ``patterns``)."""
    from huggingface_hub import snapshot_download

    if Path(str(name)).is_dir():
        return Path(str(name))
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ConfigError(unreadable(name, error, setting=setting)) from error


def unreadable(name: str | None, error: Exception, *, setting: str = "model.name") -> str:
    """Return the message for a model that cannot be read from a directory or the hub."""
    if (path := Path(str(name))).is_dir() and not (path / "config.json").is_file():
        return f"{setting}={name!r}: {path} has no config.json, which describes a model of transformers"
    if path.is_file():
        return f"{setting}={name!r}: a file; name the directory that has a config.json"
    return (
        f"{setting}={name!r}: neither a directory with a config.json here nor a model that the Hugging Face hub "
        f"hands out ({first_line(error)}); give a local directory, or check the spelling of the hub id; "
        f"without a network, run `hf download {name}` where there is one and copy the directory; "
        "a gated model needs HF_TOKEN"
    )
