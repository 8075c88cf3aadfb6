"""User-specified folders as absolute paths, and default folders."""

from __future__ import annotations

import os
from pathlib import Path

from kvtier.errors import ConfigurationError


def folder_path(value: str | os.PathLike[str], argument: str) -> Path:
    """Return ``value`` as the absolute path of a folder, independent of later changes of the current folder.

    Raises:
        ConfigurationError: it is not a path; it is empty, which would be the current folder; or it begins with the
            home of a user without one. The message names ``argument``.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigurationError(f"{argument}={value!r} is not the path of a folder.")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigurationError(f"{argument}={value!r}: {error}; set HOME, or pass an absolute path.") from error
    except OSError as error:  # the current folder is gone
        raise ConfigurationError(f"{argument}={value!r} is relative to a folder that is gone ({error}).") from error


def user_cache_folder(argument: str) -> Path:
    """Return the user's cache folder.

    Raises:
        ConfigurationError: the user has none; the message says to pass ``argument``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return folder_path(base, "XDG_CACHE_HOME")
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigurationError(f"{error}; set HOME, or pass {argument}=….") from error
