"""A network and images come in; which parts of an image, and which filters, an answer hangs on goes out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
