"""Files of tensors: read without running pickled code, written complete or not at all."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from freqprune.errors import InputError, check_file, first_line


def read(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint, tensors and plain values only; pickled code is refused, not run.

    Raises:
        InputError: if the file is missing, truncated, no checkpoint, or holds pickled code.
    """
    path = Path(path)
    check_file("ckpt", path)
    try:
        with warnings.catch_warnings():
            # A remark about pickle protocols, printed before the file is refused anyway.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "GLOBAL" in reason or "Unsupported class" in reason:
            raise InputError(
                f"ckpt = {path} holds pickled Python objects, which could run code when loaded; it was refused. Save "
                "the state dict instead: "
                "torch.save(model.state_dict(), path)"
            ) from None
        raise InputError(
            f"ckpt = {path} is damaged or is no PyTorch checkpoint ({reason.splitlines()[0]}); copy or download it "
            "again"
        ) from None
    except (
        EOFError,
        RuntimeError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        reason = first_line(error)
        raise InputError(
            f"ckpt = {path} is truncated, damaged, or no PyTorch checkpoint ({reason}); copy or download it again"
        ) from None
    if not isinstance(content, Mapping):
        raise InputError(f"ckpt = {path} holds a {type(content).__name__}, expected a checkpoint or a state dict")
    return dict(content)


def write_atomically(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a file for ``torch.load``, complete or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    buffer = io.BytesIO()
    # By way of memory: a full disk is then an OSError with its reason, which PyTorch's own writer hides.
    torch.save(dict(content), buffer)
    try:
        partial.write_bytes(buffer.getbuffer())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
