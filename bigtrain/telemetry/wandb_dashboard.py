"""The project's workspace on Weights & Biases, made with wandb-workspaces: panels, metrics and axes."""

from typing import Any

from bigtrain.telemetry import names
from bigtrain.telemetry.names import dashboard_name


def build_dashboard(project: str, entity: str, name: str) -> Any:
    """Return the workspace, by wandb-workspaces; its ``save()`` needs a key and network."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import LinePlot

    def plot(title: str, *metrics: str, axis: str = names.STEP, **options: Any) -> LinePlot:
        return LinePlot(title=title, x=axis, y=list(metrics), **options)

    def family(title: str, prefix: str, **options: Any) -> LinePlot:
        return plot(title, metric_regex=f"{prefix}/.*", **options)

    losses = (dashboard_name(names.LOSS), dashboard_name(names.LOSS, "val"))
    sections: dict[str, list[Any]] = {
        "Learning": [
            plot("Loss over tokens", *losses, axis=names.TOKENS),
            plot("Loss over steps", *losses),
            family("Validation", "val"),
            plot("Gradient norm before clipping", dashboard_name(names.GRAD_NORM), log_y=True),
            plot("Learning rate", dashboard_name(names.LR)),
        ],
        "Speed": [
            plot("Tokens per second", dashboard_name(names.TOKENS_PER_SECOND)),
            plot("Model FLOPs utilisation", names.MFU_CAUSAL, names.MFU_FULL_ATTENTION),
            plot("Goodput, and share of the time without data", names.GOODPUT, names.DATA_WAIT_FRACTION),
            plot("Seconds of a step", *names.PHASES, plot_type="stacked-area"),
        ],
        "Layers": [
            family("Update relative to the weights", names.LAYER_UPDATE_RATIO, log_y=True),
            family("Gradient norm", names.LAYER_GRAD_NORM, log_y=True),
            family("Norm of the weights", names.LAYER_PARAM_NORM, log_y=True),
        ],
        "Machine": [
            plot("Device memory", names.PEAK_BYTES, names.RESERVED_BYTES, names.ALLOCATED_BYTES),
            plot("Host memory", names.HOST_RSS_BYTES),
            plot("GPU utilisation", names.UTILISATION_PERCENT),
            plot("GPU power", names.POWER_WATTS),
        ],
        "Data": [
            family("Passes over each source", names.SOURCE_EPOCHS),
            family("Tokens of each source", names.SOURCE_TOKENS),
        ],
    }
    shown = [workspaces.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()]
    return workspaces.Workspace(name=name, project=project, entity=entity, sections=shown)
