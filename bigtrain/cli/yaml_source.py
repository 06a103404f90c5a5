"""Hydra's YAML files, with text settings as written: the ``010`` of ``name: 010`` is no number."""

from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from bigtrain.config.convert import is_text

_TEXT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))


def keep_text(schema: type) -> None:
    """Replace Hydra's source of files; ``schema`` has the settings that are text."""

    class FileConfigSource(file_config_source.FileConfigSource):
        def load_config(self, config_path: str) -> ConfigResult:
            result = super().load_config(config_path)
            path = Path(self.path, self._normalize_file_name(config_path))
            group = config_path.rpartition("/")[0].replace("/", ".")
            package = (result.header.get("package") or "_group_").replace("_group_", group)
            result.config = _read(path, package.removeprefix("_global_").lstrip("."), schema) or result.config
            return result

    SourcesRegistry.instance().types["file"] = FileConfigSource


def _read(path: Path, package: str, schema: type) -> Any:
    loader = get_yaml_loader()(path.read_text(encoding="utf-8"))
    node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
        return None
    _keep(node, package, schema)
    return OmegaConf.create(loader.construct_document(node))


def _keep(node: yaml.Node, key: str, schema: type) -> None:
    """Tag as text the names of settings, the values of text settings, and the entries of a defaults list."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.tag == _MERGE:
                _keep(value, key, schema)
            elif isinstance(name, yaml.ScalarNode):
                name.tag = _TEXT
                _keep(value, f"{key}.{name.value}".removeprefix("."), schema)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep(item, key, schema)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != _NULL:
        is_meant = is_text(schema, key) or "defaults" in key.split(".")
        node.tag = _TEXT if is_meant else node.tag
