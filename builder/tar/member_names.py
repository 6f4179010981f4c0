"""The names of members: keys, extensions, and the files that macOS adds."""

from __future__ import annotations

import re

#: A name of a sample's member. Source: webdataset.tariterators.base_plus_ext.
_WEBDATASET = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name at the first dot of its base name into key and extension; the key keeps folders and `./`.

    This is exactly webdataset's rule. It gives `a/.b` the key `a/` unless the name of that folder contains a dot, and
    does not recognize a folder in front of a newline.

    Returns None for a name that belongs to no sample: without a dot, with nothing before it, or a `__meta__` name.
    """
    if "\n" in name and not _WEBDATASET.match(name):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or (name.startswith("__") and re.match(r"__[^/]*__($|/)", name)):
        return None
    if not stem and (not slash or "." in folder.rpartition("/")[2]):
        return None
    return folder + slash + stem, extension


def belongs(name: str) -> tuple[str, str] | None:
    """A member's key and extension as `split_name` returns them; None also for files that macOS adds.

    Such members have no picture, and would split the samples between whose members they are.
    """
    return None if is_of_macos(name) else split_name(name)


def is_of_macos(name: str) -> bool:
    """Whether a member was added by macOS: `._NAME` (AppleDouble), `.DS_Store`, everything in `__MACOSX/`."""
    *folders, base = name.split("/")
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folders
