"""Exports are opened by transformers 4 as by transformers 5: nothing is missing, and the logits are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigtrain.config import ModelConfig, ModelKind, Precision
from bigtrain.models.hf.build import HFCausalLM
from bigtrain.run.export import export
from tests.hf_families import FAMILIES, build_family
from tests.unit.hf_export_test import save

TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
LACKING = {"hrm_text"}
"""Families that transformers 4 has not."""
OPEN = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
found = {"version": transformers.__version__}
for right in sorted(Path(".").glob("*/right.safetensors")):
    tensors = load_file(right)
    directory = right.parent / "out"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=tensors["ids"], use_cache=False).logits
    found[right.parent.name] = {
        "lacking": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
        "difference": (logits - tensors["logits"]).abs().max().item(),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def transformers_4() -> Path:
    """A directory with transformers 4 and what it needs in other versions; it is kept in the virtual environment."""
    directory = Path(sys.prefix, "transformers4")
    if not (directory / "installed").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
        result = subprocess.run([*command, *TRANSFORMERS_4], capture_output=True, text=True, timeout=300, check=False)
        if result.returncode:
            pytest.skip(f"transformers 4 cannot be installed: {result.stderr[-300:]}")
        (directory / "installed").touch()
    return directory


def write_exports(directory: Path) -> None:
    """Export a model of every family, described in the form of transformers 5, with its logits beside it."""
    ids = torch.randint(3, 97, (1, 48), generator=torch.Generator().manual_seed(0))
    for family in FAMILIES.keys() - LACKING:
        model, place = build_family(family), directory / family
        model.save_pretrained(place / "base")
        config = ModelConfig(kind=ModelKind.hf, name=str(place / "base"), pretrained=True)  # for its stored buffers
        save(place / "run", HFCausalLM(model), config)
        export(place / "run", place / "out", precision=Precision.fp32, max_shard_bytes=10**9)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        save_file({"ids": ids, "logits": logits.contiguous()}, place / "right.safetensors")


def opened(directory: Path, **variables: str) -> dict:
    """Return what another process finds when it opens the exports."""
    command = [sys.executable, "-c", OPEN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_versions_compute_the_same(transformers_4: Path, tmp_path: Path):
    write_exports(tmp_path)
    older = opened(tmp_path, PYTHONPATH=str(transformers_4))
    newer = opened(tmp_path)
    assert (older.pop("version")[0], newer.pop("version")[0]) == ("4", "5")
    for found in (older, newer):
        assert found.keys() == FAMILIES.keys() - LACKING
        wrong = {family: told for family, told in found.items() if told["lacking"] or not told["difference"] <= 1e-5}
        assert wrong == {}
    # The comparison sees a setting that only transformers 5 finds.
    config = tmp_path / "gpt_neox" / "out" / "config.json"
    for family in FAMILIES.keys() - {"gpt_neox"} - LACKING:
        (tmp_path / family / "right.safetensors").unlink()
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({key: settings[key] for key in settings if not key.startswith("rotary_")}))
    assert opened(tmp_path, PYTHONPATH=str(transformers_4))["gpt_neox"]["difference"] > 1e-3
    assert opened(tmp_path)["gpt_neox"]["difference"] <= 1e-5
