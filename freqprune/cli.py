"""What `train.py` and `prune.py` share on the command line: run folders, and errors that a person can act on."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from freqprune.config import no_such_key, register
from freqprune.errors import InputError

log = logging.getLogger(__name__)


def run(main: Callable[[], Any], config_dir: Path, config_name: str) -> None:
    """Call a Hydra main function; bad input ends with one clear message and exit status 2 instead of a traceback."""
    register()
    # One name for the run folder, also for the further processes of a distributed run.
    os.environ.setdefault("FREQPRUNE_RUN_ID", time.strftime("%Y-%m-%d_%H-%M-%S"))
    # Hydra would print its own shortened traceback; with this set, exceptions come through to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    keep_freed_memory()
    try:
        try:
            main()
        finally:
            gather_sweep()
    except InputError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error, config_dir, config_name))
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.strerror}: {error.filename or 'while writing'}; check the free space and the permissions of the output folder")


class Gather(Callback):
    """Hydra callback: remembers the folder of a sweep, for `gather_sweep` at its end, and refuses one that holds the results of another."""

    folder: str | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from freqprune.jobs import asked, check_goes_on

        folder, hydra = str(config.hydra.sweep.dir), cast(dict[str, Any], OmegaConf.to_container(config.hydra, resolve=False))
        if hydra["sweep"]["subdir"] == "${hydra.job.num}":
            try:
                check_goes_on(Path(folder), asked(hydra))
            except InputError as error:
                # Hydra only warns of exceptions in callbacks.
                fail(str(error))
        Gather.folder = folder


def gather_sweep() -> None:
    """Gather the sweep of this process, if there is one, as far as it came; never in the way of the error that ended it."""
    folder, Gather.folder = Gather.folder, None
    if folder is None or not Path(folder).is_dir():
        return
    from freqprune.sweeps import gather

    try:
        gather([folder])
    except Exception as error:
        log.warning("%s could not be gathered (%s: %s); try again with python -m freqprune.sweeps %s", folder, type(error).__name__, error, folder)


def keep_freed_memory() -> None:
    """glibc hands every large block that is freed back to the system and then faults it in anew: about 10 % of a training step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _explain(error: Exception, config_dir: Path, config_name: str) -> str:
    cause = error.__cause__
    reasons = [str(error).strip()]
    while cause is not None:
        if str(cause).strip() not in reasons[-1]:
            reasons.append(str(cause).strip())
        cause = cause.__cause__
    message = "\n".join(" ".join(line for line in reason.splitlines() if not line.strip().startswith(("object_type", "full_key"))) for reason in reasons)
    hint = _near_key(str(error), config_dir, config_name)
    return message + (f"\n{hint}" if hint else "")


def _near_key(message: str, config_dir: Path, config_name: str) -> str:
    """Name the keys that look like the one of a failed override."""
    if "not in struct" not in message and "not in '" not in message and "Could not override" not in message:
        return ""
    keys = [argument.lstrip("+~").split("=")[0] for argument in sys.argv[1:] if "=" in argument]
    given = next((key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)), "")
    if not given:
        return ""
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base="1.3"):
        return no_such_key(given, compose(config_name))
