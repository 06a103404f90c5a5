"""Make a dashboard in a Weights & Biases project: ``python launch/dashboard.py entity=me``; ``--help`` says more."""

import os
from dataclasses import dataclass
from functools import partial

from bigtrain.cli import hydra_cli
from bigtrain.config.packages import require
from bigtrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class DashboardConfig:
    project: str | None = None
    """Weights & Biases project, as in ``logging.wandb_project``; by default that of ``WANDB_PROJECT``, or ``bigtrain``."""
    entity: str | None = None
    """Weights & Biases user or team that the project belongs to; by default that of ``WANDB_ENTITY``."""
    name: str = "bigtrain"
    """Name of the workspace."""


HELP = """\
Save a workspace in a Weights & Biases project, with panels for loss, speed, norms per layer, memory and data, over
the metrics that every run of bigtrain has. It prints the workspace's address.

  pip install 'bigtrain[dashboard]'
  python launch/dashboard.py entity=me project=mine
"""


def read(args: list[str]) -> DashboardConfig:
    config = hydra_cli.read(DashboardConfig, args)
    config.entity = config.entity or os.environ.get("WANDB_ENTITY")
    if not config.entity:
        raise ConfigError("whose project? set entity=<user or team>")
    return config


def run(config: DashboardConfig) -> None:
    require("dashboard", "wandb_workspaces", "dashboard")
    from bigtrain.telemetry.wandb_dashboard import build_dashboard
    from bigtrain.telemetry.wandb_logger import default_project, has_api_key

    if not has_api_key(os.environ):
        raise ConfigError("there is no key: set WANDB_API_KEY or run `wandb login`")
    workspace = build_dashboard(config.project or default_project(os.environ), str(config.entity), config.name)
    try:
        workspace.save()
    except Exception as error:
        raise ConfigError(f"the workspace could not be saved: {error}") from error
    print(workspace.url)


main = partial(hydra_cli.command, DashboardConfig, run, HELP, reader=read)
