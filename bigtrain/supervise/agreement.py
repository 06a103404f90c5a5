"""All ranks stop at the same step boundary."""

import torch
import torch.distributed as dist

from bigtrain.supervise.signals import REASONS


class StopAgreement:
    """Stops all ranks at the same step without waiting: the all-reduce of one step is read after the next one."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._is_alone = dist.get_world_size() == 1
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self, reason: str | None) -> str | None:
        """Return any rank's stop request, one of :data:`REASONS`, at the previous call; all ranks call this."""
        if self._is_alone:
            return reason
        agreed = self.settle()
        wish = torch.tensor([0 if reason is None else 1 + REASONS.index(reason)])
        self._pending = (dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True), wish)
        return agreed

    def settle(self) -> str | None:
        """Wait for the all-reduce under way, if any, and return its result."""
        if self._pending is None:
            return None
        work, wish = self._pending
        work.wait()
        self._pending = None
        return REASONS[int(wish) - 1] if wish else None
