"""torch.nn's softmax layers and loss on our kernels; see modules.py."""

from __future__ import annotations

import torch

from tileconv.kernels.functional import cross_entropy, log_softmax, softmax

for _name in ("cross_entropy", "log_softmax", "softmax"):
    torch.fx.wrap(_name)  # symbolic tracing records the call: the argument checks inside cannot read a proxy


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax, for tensors of any shape; dim has to be given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax, for tensors of any shape; dim has to be given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return log_softmax(input, self.dim)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: logits [N, C, ...] and classes [N, ...] or probabilities [N, C, ...] -> the loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


__all__ = ["CrossEntropyLoss", "LogSoftmax", "Softmax"]
