"""A name, a config or a checkpoint comes in; a network goes out, with what it costs, hooks into it, and files of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
