"""Responses, verdicts and the metrics of runs come in; the record of a run, its figures, tables and page, and those of
a sweep go out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
