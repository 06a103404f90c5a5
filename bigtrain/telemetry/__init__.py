"""Metrics, events and messages of a run: written to files, from which console and dashboards are fed."""
