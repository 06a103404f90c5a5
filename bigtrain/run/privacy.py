"""What a private run spends: epsilon by Opacus' accountant, after any number of steps."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.store import RunState
from bigtrain.config import PrivacyConfig, TrainConfig
from bigtrain.config.convert import to_dict
from bigtrain.config.packages import require
from bigtrain.data.read.stream import SampleStream
from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.log import get_logger


@dataclass(frozen=True, slots=True)
class Account:
    """Rényi differential privacy (Mironov et al., 2019, arXiv 1908.10530) of steps with ``batch_size`` of ``num_samples``."""

    privacy: PrivacyConfig
    batch_size: int
    num_samples: int

    def epsilon(self, steps: int) -> float:
        """Return what is spent if every step draws each sample with the same probability, as Opacus reports it."""
        return self._epsilon(min(self.batch_size / self.num_samples, 1.0), steps)

    def epsilon_any_order(self, steps: int) -> float:
        """Return a bound for what is spent in whatever order: nothing is gained by chance.

        A sample is drawn once an epoch. Where epochs meet within a step it may be in that step more than once, k times,
        which costs as much as k * k steps.
        """
        is_even = self.num_samples % self.batch_size == 0
        at_once = 1 if is_even else 1 + math.ceil(self.batch_size / self.num_samples)
        return self._epsilon(1.0, at_once * math.ceil(steps * self.batch_size / self.num_samples))

    def _epsilon(self, rate: float, steps: int) -> float:
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.privacy.noise_multiplier, rate, steps)]
        with warnings.catch_warnings(action="ignore"):  # of orders at the end of its list, whose bound holds
            return accountant.get_epsilon(self.privacy.delta)

    def metrics(self, step: int) -> dict[str, float]:
        found = {"train/epsilon": self.epsilon(step), "train/epsilon_any_order": self.epsilon_any_order(step)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def steps_within(self, max_epsilon: float, steps: int) -> int:
        """Return how many of ``steps`` spend at most ``max_epsilon``."""
        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon(middle) <= max_epsilon else (low, middle - 1)
        return low


def open_account(
    config: TrainConfig, stream: SampleStream, state: RunState | None, checkpoint: Path | None
) -> Account | None:
    """Return the account of a private run, None of another one; say what it spends, and what is not in it.

    ConfigError: more than ``privacy.max_epsilon``; or the run was begun with other settings, of which it has no account.
    """
    privacy, batch_size, steps = config.privacy, config.train.global_batch_size, config.train.steps
    before = state.config.get("privacy", to_dict(PrivacyConfig())) if state else to_dict(privacy)
    size_before = state.config["train"]["global_batch_size"] if state else batch_size
    names = ["max_grad_norm", "noise_multiplier"] if privacy.max_grad_norm or before["max_grad_norm"] else []
    changed = [f"privacy.{name}: {before[name]}" for name in names if before[name] != getattr(privacy, name)]
    changed += [f"train.global_batch_size: {size_before}"] if names and size_before != batch_size else []
    if changed:
        problem = f"{config.run.directory} was begun with {', '.join(changed)}, by which it has spent; go on so"
        raise of_all_ranks(ConfigError(problem))
    if privacy.max_grad_norm is None:
        return None
    require("privacy.max_grad_norm", "opacus", "privacy")
    account = Account(privacy, batch_size, stream.num_samples)
    if privacy.delta * account.num_samples >= 1:
        most = f"must be less than 1 / {account.num_samples}, the number of samples"
        problem = f"privacy.delta={privacy.delta:g}: {most}; else one of them may be given away whole"
        raise of_all_ranks(ConfigError(problem))
    spent, limit = account.epsilon(steps), privacy.max_epsilon
    if limit is not None and spent > limit:
        fitting = f"{account.steps_within(limit, steps)} steps fit (train.steps), or a larger privacy.noise_multiplier"
        problem = f"privacy.max_epsilon={limit:g}: {steps} steps would spend {spent:.4g}; {fitting}"
        raise of_all_ranks(ConfigError(problem))
    any_order = f"{account.epsilon_any_order(steps):.4g} in whatever order they come"
    told = f"epsilon {spent:.4g} after {steps} steps, as if batches were drawn at random (Poisson); {any_order}"
    get_logger().info(f"privacy: {told}; delta {privacy.delta:g}, a sample each")
    if checkpoint and not state:
        left_out = "what they hold of these samples already is in no epsilon here; add what that run has spent on them"
        get_logger().warning(f"privacy: beginning with the weights of {checkpoint}: {left_out}")
    return account
