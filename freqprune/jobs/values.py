"""Values of a configuration as the types that their fields have, and what is said of keys that are not there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from freqprune.errors import InputError, closest

# What YAML takes for true and false, and Hydra's command line for words.
TRUTHS = {"on": True, "yes": True, "off": False, "no": False}
# Sections whose keys are the arguments of whatever their _target_ (of model: its name) stands for.
FREE = ("data", "model", "trainer", "logger", "callbacks")
# Endings of keys of free sections whose words are names, and keys by which loggers call a run.
NAMED = ("name", "_column", "_key", "root", "_dir")
OF_A_RUN = ("project", "entity", "group", "version", "id", "notes", "prefix", "job_type")


def with_booleans(value: Any) -> Any:
    """on, off, yes and no as true and false, as sections with types have them; Hydra hands them on as words."""
    if isinstance(value, dict):
        return {
            # A name may be no, as that of Norwegian.
            key: one if key in OF_A_RUN or str(key).endswith(NAMED) else with_booleans(one)
            for key, one in value.items()
        }
    return TRUTHS.get(value.lower(), value) if isinstance(value, str) else value


def plain(section: Any) -> Any:
    """A config section as plain dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True, throw_on_missing=True)


def plain_value(cfg: DictConfig, name: str) -> Any:
    """A value as plain lists or scalars."""
    value = cfg[name]
    return plain(value) if OmegaConf.is_config(value) else value


def typed(hint: Any, value: Any, key: str) -> Any:
    """A value as the type that its field has; InputError with the key and what is allowed if that cannot be."""
    # A file may have a number for its name.
    a_word = hint is str or (str in get_args(hint) and get_origin(hint) is not Mapping)
    if a_word and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    # Where a name may stand, on, off, yes and no are none.
    tried: Any = Annotated[hint, Field(union_mode="left_to_right")] if {bool, str} <= {*get_args(hint)} else hint
    try:
        return TypeAdapter(tried, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        raise InputError(f"{key} must be {_in_words(hint)}, got {value!r}") from None


WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "null"}


def _in_words(hint: Any) -> str:
    """A type as users know it.

    >>> _in_words(float | None), _in_words(Sequence[float] | str), _in_words(int | Literal["auto"])
    ('a number or null', 'a list ([...]) or a word', 'a whole number or auto')
    >>> _in_words(Mapping[str, float])
    'a mapping ({...})'
    """
    words: list[str] = []
    alone = get_origin(hint) in (Literal, Mapping, Sequence)
    for part in (hint,) if alone else get_args(hint) or (hint,):
        if get_origin(part) is Literal:
            words += map(str, get_args(part))
        elif get_origin(part) is Mapping:
            words.append("a mapping ({...})")
        elif part in WORDS or get_origin(part) is Sequence:
            words.append(WORDS.get(part, "a list ([...])"))
    return " or ".join(words)


def no_such_key(given: str, cfg: DictConfig) -> str:
    """Message for a key that does not exist, with those that look like it."""
    keys = _keys(cfg)
    last = given.rsplit(".", 1)[-1]
    # The same last word elsewhere in the tree beats a similar spelling.
    if given == "experiment":
        return "experiment is not a setting: a config of an experiment begins with the line # @package _global_"
    keys = [key for key in keys if key != given and not key.startswith(f"{given}.")]
    same = [key for key in keys if key.rsplit(".", 1)[-1] == last]
    longer = [key for key in keys if key.rsplit(".", 1)[-1].endswith(f"_{last}")]
    same += sorted(longer, key=lambda key: len(key.rsplit(".", 1)[-1]))
    # Of the section that was named first.
    same.sort(key=lambda key: key.split(".")[0] != given.split(".")[0])
    hint = f"; did you mean {' or '.join(same[:3])}?" if same else closest(given, keys)
    if given.split(".")[0] in FREE and "." in given:
        hint += f"; with a plus (+{given}=VALUE) it goes to what the section stands for"
    return f"{given} is not a setting{hint or '; --cfg job lists all of them'}"


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, cfg):
        found.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += _keys(node, f"{prefix}{key}.")
    return found


def override(key: str, path: str | PurePath) -> str:
    """``key=path`` as Hydra reads it: quoted where the path has what stands for something else there, such as the ``=``
    of a folder that is named after settings.

    >>> override("ckpt", "runs/seed=1/last.ckpt")
    "ckpt='runs/seed=1/last.ckpt'"
    >>> from pathlib import PureWindowsPath
    >>> override("ckpt", PureWindowsPath(r"C:\\runs\\last.ckpt"))
    'ckpt=C:/runs/last.ckpt'
    """
    # Python takes such paths on Windows too, and no shell reads anything into them.
    text = path.as_posix() if isinstance(path, PurePath) else path
    if re.fullmatch(r"[A-Za-z0-9_./:%+@ -]+", text) and text == text.strip():
        return f"{key}={text}"
    escaped = text.replace("'", "\\'")
    return f"{key}='{escaped}'"
