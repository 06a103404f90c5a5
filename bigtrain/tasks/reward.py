"""A number for each answer, larger for the chosen one of a pair: a reward model.

Shape suffixes: B pairs, T tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.tasks.base import IGNORE_INDEX, Field
from bigtrain.tasks.inputs import require_size
from bigtrain.tasks.preference import Preference


class Reward(Preference):
    """The Bradley-Terry loss of the rewards of two answers (Ouyang et al. 2022, eq. 1), of pairs as preferences have them.

    The network reads prompt and answer, with the token that ends it, and returns one number ``(B, 1)``.
    """

    @property
    def fields(self) -> Mapping[str, Field]:
        return {name: field for name, field in super().fields.items() if not field.is_optional}

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss in nats and the sums of which metrics are made."""
        chosen_BT, chosen_targets_BT, rejected_BT, rejected_targets_BT = tensors
        texts, counts = [], []
        for tokens_BT, targets_BT in ((chosen_BT, chosen_targets_BT), (rejected_BT, rejected_targets_BT)):
            is_counted_BT = targets_BT != IGNORE_INDEX
            places_T = torch.arange(targets_BT.shape[1], device=targets_BT.device)
            last_B = (places_T * is_counted_BT).amax(dim=1)
            # Targets are one token ahead: the last one is the only one that is not among the tokens.
            end_B1 = targets_BT.gather(1, last_B[:, None]).clamp(min=0)
            texts.append((F.pad(tokens_BT, (0, 1)).scatter(1, last_B[:, None] + 1, end_B1), last_B + 2))
            counts.append(is_counted_BT.any(dim=1))
        length = max(text.shape[1] for text, _ in texts)
        both = torch.cat([F.pad(text, (0, length - text.shape[1])) for text, _ in texts])
        rewards = network(both, torch.cat([lengths for _, lengths in texts])).float()
        require_size(rewards, 1, "rewards of an answer")
        rewards_2B, counts_B = rewards.view(2, -1), counts[0] & counts[1]
        margins_B = (rewards_2B[0] - rewards_2B[1]).where(counts_B, 0)
        loss = -F.logsigmoid(margins_B).where(counts_B, 0).sum()
        sums = [counts_B.sum(), (margins_B > 0).sum(), margins_B.sum(), *rewards_2B.where(counts_B, 0).sum(dim=1)]
        return torch.stack([loss, *(value.detach().float() for value in sums)])
