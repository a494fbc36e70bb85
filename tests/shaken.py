"""Networks that have not been trained, but whose norms do something."""

from torch import nn


def shaken(net: nn.Module) -> nn.Module:
    """Eval mode with batch norms that are not the identity, so that a wrong channel shows."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()
