"""A data set and a network come in; a trained network goes out, tagged and pruned on the way if asked for."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
