"""What members are called: keys, extensions, and what macOS puts next to files."""

from __future__ import annotations

import re

#: A name of a sample's member. Source: webdataset.tariterators.base_plus_ext.
_WEBDATASET = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and extension: up to the first dot of its base name, folder and `./` kept.

    Exactly webdataset's rule, which gives `a/.b` the key `a/` unless that folder's own name has a dot, and sees no
    folder in front of a newline.

    Returns None for a name that belongs to no sample: no dot, nothing before it, or webdataset's `__meta__` names.
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
    """A member's key and extension, as `split_name` has them; None also for what macOS puts beside files.

    Readers that take such members for samples find no picture in them; they would part the samples that they lie in.
    """
    return None if is_of_macos(name) else split_name(name)


def is_of_macos(name: str) -> bool:
    """Whether a member is what macOS puts beside files: `._NAME` (AppleDouble), `.DS_Store`, all of `__MACOSX/`."""
    *folders, base = name.split("/")
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folders
