"""All ranks stop at the same step boundary."""

import torch
import torch.distributed as dist

from bigtrain.supervise.signals import REASONS


class StopAgreement:
    """Agreement of all ranks to stop at the same step, without waiting for each other.

    The exchange that a rank starts after one step is read after the next one, when it has long
    been completed in the background; so every rank learns of a wish at the same step boundary.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self, reason: str | None) -> str | None:
        """Return why a rank wanted to stop at the previous call, if one did; every rank calls this once per step.

        Args:
            reason: one of :data:`REASONS` if this rank wants to stop.
        """
        if dist.get_world_size() == 1:
            return reason
        agreed = self.settle()
        wish = torch.tensor([0 if reason is None else 1 + REASONS.index(reason)])
        self._pending = (dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True), wish)
        return agreed

    def settle(self) -> str | None:
        """Wait for the exchange under way, if any, and return its result."""
        if self._pending is None:
            return None
        work, wish = self._pending
        work.wait()
        self._pending = None
        return REASONS[int(wish) - 1] if wish else None
