"""AlexNet's shape, small enough to train on small pictures and without a GPU."""

from __future__ import annotations

from torch import nn

from tileconv.model.alexnet import AlexNet
from tileconv.model.steps import keep_channels_last


class AlexNetMini(AlexNet):
    """Input [N, channels, H, W] with H and W of at least 23 (made for 28 to 64), output [N, num_classes].

    AlexNet's five convolutions, three overlapping max-pools (3x3, stride 2) and three fully connected layers with
    dropout, under the same state_dict keys. The first convolution is 5x5 with stride 1, not 11x11 with stride 4, which
    would leave nothing of 28 pixels; widths are 32-64-96-64-64 and 256. A 28x28 picture is 13, 6 and 2 pixels high
    after the pools. Larger ones are averaged to 2x2 before the fully connected layers.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, dropout: float = 0.5) -> None:
        nn.Module.__init__(self)  # not AlexNet's: that would draw its 61 million weights
        # The places of the layers are AlexNet's, so its forward() and its reference run this network too.
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(32, 64, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 96, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(96, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(64 * 2 * 2, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )
        self.reset_parameters()
        keep_channels_last(self)

    def reset_parameters(self) -> None:
        """AlexNet's weights (He et al.), but biases of zero and a last layer so small that training starts calmly."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        last = self.classifier[6]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)  # as in the AlexNet paper
