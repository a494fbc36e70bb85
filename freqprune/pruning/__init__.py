"""A network, images and its response come in; a smaller network goes out, proved equal to the silenced one and made up
for what it lost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
