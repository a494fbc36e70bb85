"""What is wrong, in words that one can act on, where a command ends early."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from freqprune.errors import InputError
from freqprune.jobs.config import conf_dir
from freqprune.jobs.values import no_such_key


def message_of(error: Exception) -> str | None:
    """What a person is to read; None for an error that is a defect."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, HydraException):
        return str(error).strip()
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has stopped reading.
        sys.exit(1)
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename or "while writing"
        return f"{error.strerror}: {where}; check the free space and the permissions of the output folder"
    return None


def fail(message: str) -> None:
    """Say what is wrong and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def reasons_of(error: Exception, name: str) -> str:
    """What Hydra says and why, and the keys that look like a wrong one; `name` of the main config."""
    cause = error.__cause__
    reasons = [str(error).strip()]
    while cause is not None:
        if str(cause).strip() not in reasons[-1]:
            reasons.append(str(cause).strip())
        cause = cause.__cause__
    message = "\n".join(
        " ".join(line for line in reason.splitlines() if not line.strip().startswith(("object_type", "full_key")))
        for reason in reasons
    )
    hint = _lacking_launcher(message) or _near_key(str(error), name)
    return message + (f"\n{hint}" if hint else "")


def _lacking_launcher(message: str) -> str:
    """What to install for a launcher that is in none of the installed packages."""
    asked = re.search(r"Could not find 'hydra/launcher/((joblib|submitit|ray)\w*)'", message)
    if asked is None or _is_there(f"hydra_plugins.hydra_{asked[2]}_launcher"):
        return ""
    extra = "slurm" if asked[2] == "submitit" else asked[2]
    return f"hydra/launcher={asked[1]} needs a package that is not there: pip install 'freqprune[{extra}]'"


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # Not even what it would lie in: there is no plugin at all.
        return False


def _near_key(message: str, name: str) -> str:
    """Name the keys that look like the one of a failed override."""
    if "not in struct" not in message and "not in '" not in message and "Could not override" not in message:
        return ""
    keys = [argument.lstrip("+~").split("=")[0] for argument in sys.argv[1:] if "=" in argument]
    given = next((key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)), "")
    if not given:
        return ""
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(conf_dir().resolve()), version_base="1.3"):
        return no_such_key(given, compose(name))
