"""Bonuses of visited states: by counts, by an elliptical norm, and by the difference of two errors."""

import torch
from torch import Tensor


def count_bonuses(episodic: Tensor, overall: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bonuses of counts, which include the visit itself; two of [N] float64.

        first = 1 if episodic = 1 else 0,   rare = 1 / sqrt(overall)

    Args:
        episodic: [N] int64, how often the episode has been in the state.
        overall: [N] int64, how often all episodes have.

    Source: Henaff et al. 2023, arXiv:2306.03236.
    """
    return (episodic == 1).double(), overall.clamp(min=1).double().rsqrt()


def elliptical_bonuses(features: Tensor, ridge: float) -> Tensor:
    """Return the squared norm of each feature under the inverse covariance of those before it; [N] float64.

        C_1^-1 = I / ridge,   b_t = h_t' C_t^-1 h_t
        C_{t+1}^-1 = C_t^-1 - u u' / (1 + b_t),   u = C_t^-1 h_t

    Args:
        features: [N, d] float, the features h of an episode's states in order.
        ridge: The regularisation, above 0.

    Source: E3B, Henaff et al. 2022, arXiv:2210.05805, eq. 2.
    """
    inverse = torch.eye(features.shape[1], dtype=torch.float64) / ridge
    found = features.new_zeros(len(features), dtype=torch.float64)
    for index, feature in enumerate(features.double()):
        along = inverse @ feature
        found[index] = feature @ along
        inverse = inverse - torch.outer(along, along) / (1 + found[index])
    return found


def error_increases(errors: Tensor, share: float) -> Tensor:
    """Return by how much each error exceeds a share of the one before it, at least 0; [N], 0 at the first.

        d_t = max(0, e_t - share * e_{t-1})

    Source: NovelD, Zhang et al. 2021.
    """
    before = torch.nn.functional.pad(errors[:-1], (1, 0))
    found = (errors - share * before).clamp(min=0)
    return torch.cat([torch.zeros_like(found[:1]), found[1:]])
