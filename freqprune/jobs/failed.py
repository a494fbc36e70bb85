"""A job of a sweep that failed lets go of what it holds, so that the others have room."""

from __future__ import annotations

import gc
import sys
import traceback
from contextlib import suppress


def let_go(error: BaseException) -> None:
    """Free what the frames of an error hold, networks and images among it: Hydra keeps the error until the sweep ends.

    A run of W&B that it leaves open ends too: the next job would log into it.
    """
    chain: BaseException | None = error
    seen: list[BaseException] = []
    while chain is not None and chain not in seen:
        traceback.clear_frames(chain.__traceback__)
        seen.append(chain)
        chain = chain.__cause__ or chain.__context__
    # Only what the job itself has imported.
    wandb, torch = sys.modules.get("wandb"), sys.modules.get("torch")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        # What went wrong must not be hidden by what goes wrong now.
        with suppress(Exception):
            wandb.finish(exit_code=1)
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
