"""freqprune: frequency tagging of neural networks, and pruning by what it shows."""

import lazy_loader

from freqprune import _moved

# Imported on first use: the command line answers --help and typos without waiting for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_moved.install()
