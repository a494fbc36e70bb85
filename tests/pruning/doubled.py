"""Networks half of whose filters are copies of others, so that nothing is lost without them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def images(n_images: int = 24, size: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(n_images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def double(layer: nn.Module, norm: nn.BatchNorm2d | None = None) -> None:
    """The second half of a layer's filters: copies of the first, each times its own factor."""
    half = len(layer.weight) // 2  # type: ignore[arg-type, index]
    factors = torch.linspace(0.5, 2, half)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *([] if norm is None else norm.named_parameters())]:
            if norm is None or tensor is not layer.weight:
                scale = factors.view(-1, *[1] * (tensor.dim() - 1))
                tensor[half:] = tensor[:half] * (scale if name in ("weight", "bias") else 1)
        if norm is not None:
            layer.weight[half:] = layer.weight[:half]  # type: ignore[index, operator]


class Residual(nn.Module):
    """A block whose shortcut is the identity or a convolution, after another that shifts what it reads."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(8, 8, 1) if projected else nn.Identity()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return self.head(F.relu(y).mean((2, 3)))  # type: ignore[no-any-return]


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.b, self.head = nn.Conv2d(14, 6, 3, padding=1), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.expand(x)))
        return self.head(F.relu(self.project(F.relu(self.depthwise(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def settled(net: nn.Module) -> nn.Module:
    """With statistics and scales that no batch norm starts with."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.3, 2)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return net.eval()


def copied(norm: nn.BatchNorm2d) -> None:
    half = norm.num_features // 2
    for tensor in (norm.running_mean, norm.running_var):
        tensor[half:] = tensor[:half]  # type: ignore[index]


def residual(projected: bool) -> tuple[nn.Module, str, int]:
    net = settled(Residual(projected))
    double(net.conv1, net.bn1)
    copied(net.bn1)
    return net, "conv1", 6


def concatenated() -> tuple[nn.Module, str, int]:
    net = settled(Concatenated())
    double(net.a)
    return net, "a", 4


def depthwise() -> tuple[nn.Module, str, int]:
    net = settled(Depthwise())
    double(net.expand, net.norm)
    copied(net.norm)
    with torch.no_grad():
        # Kernels copied as they are: the factors are those of what comes in; a bias would not scale with it.
        net.depthwise.weight[4:] = net.depthwise.weight[:4]
        net.depthwise.bias.zero_()
    return net, "expand", 4
