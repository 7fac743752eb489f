"""How wrong a classifier is."""

from __future__ import annotations

import torch


def topk_error(logits: torch.Tensor, targets: torch.Tensor, k: int = 1) -> torch.Tensor:
    """The fraction of rows whose class is not among the k largest scores: top-1 error for k = 1, top-5 for k = 5.

    logits [N, C], targets int64 [N], 1 <= k <= C -> an fp64 scalar on their device; NaN for no rows.  Of equal scores
    the smaller class comes first; a row whose own score is NaN, or has k NaNs elsewhere, is wrong.  Raises TypeError or
    ValueError that names the argument.
    """
    if not logits.is_floating_point() or targets.dtype != torch.int64:
        raise TypeError(
            f"logits have dtype {logits.dtype} and targets {targets.dtype}: allowed are floating point and torch.int64"
        )
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}: allowed are [N, C] and [N]"
        )
    classes = logits.shape[1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= classes:
        raise ValueError(f"k is {k!r}: allowed is 1 to the {classes} classes")
    own = logits.gather(1, targets[:, None])
    first = torch.arange(classes, device=logits.device) < targets[:, None]
    ahead = (logits > own) | ((logits == own) & first) | logits.isnan() | own.isnan()
    return (ahead.sum(1) >= k).double().mean()
