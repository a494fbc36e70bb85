"""A network and images come in; the response of every filter to tags on parts of those images goes out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
