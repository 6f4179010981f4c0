"""The proof of one edited sample: its members, picture, caption and json, and the headers around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from builder.errors import BuilderError
from builder.hybrid.verify import fields, heads
from builder.hybrid.verify.change import Change, NewImage, own_picture
from builder.hybrid.verify.problem import INGEST, Wrong, quoted_value, reason
from builder.hybrid.verify.shard_bytes import IndexedTar, indexed
from builder.table import edits
from builder.table.edits import EditsReader


@dataclass(frozen=True)
class ProvenSample:
    """What the manifest should record of an edited sample.

    Attributes:
        members: name and sha256 of each member, in order.
        provenance: how it was made, as json on one line; only for a sample without a json.
    """

    members: list[tuple[str, str]]
    provenance: str | None = None


class SampleProof:
    """Proves the edited samples of one shard.

    Args:
        fix: what the user can do about a wrong sample.
    """

    def __init__(self, source: IndexedTar, hybrid: IndexedTar, generated: EditsReader, fix: str) -> None:
        self._source, self._hybrid, self._generated, self._fix = source, hybrid, generated, fix
        self._edits_members: dict[str, dict[int, int]] = {}  # by edits tar: each member's size, by its first byte

    def prove(self, change: Change, key: str, found: Sequence[tuple[str, int]], source: Sequence[int]) -> ProvenSample:
        """Proves one sample.

        Args:
            found: extension and position of each member in the hybrid shard.
            source: positions of the sample's members in the source.

        Raises:
            Wrong: it is not what the selected row asks for.
        """
        label = f"row {change.row} (key '{key}')"
        wanted = [extension for extension, _ in change.members]
        have = [extension for extension, _ in found]
        if have != wanted:
            raise Wrong(f"{label}: its members are {', '.join(have)}, but should be {', '.join(wanted)}", self._fix)
        new = [(extension, self._hybrid.content(i)) for extension, i in found]
        old = [self._source.names[i][len(key) + 1 :] for i in source]
        provenance = self._check_contents(change, label, new, old, source)
        for (extension, i), (_, place) in zip(found, change.members, strict=True):
            self._check_record(f"{label}: its member '{extension}'", i, source[place])
        names = [self._hybrid.names[i] for _, i in found]
        digests = [hashlib.sha256(content).hexdigest() for _, content in new]
        return ProvenSample(list(zip(names, digests, strict=True)), provenance)

    def _check_contents(
        self, change: Change, label: str, new: Sequence[tuple[str, bytes]], old: Sequence[str], source: Sequence[int]
    ) -> str | None:
        """Checks the bytes of every member; returns the provenance of a sample without a json."""
        by_name = {extension.lower(): content for extension, content in new}
        old_at = {extension.lower(): i for extension, i in zip(reversed(old), reversed(source), strict=True)}
        raw = by_name.get("json")
        found = None if raw is None else self._parsed(label, raw)
        if change.caption is not None:
            self._check_caption(label, change.caption, by_name.get("txt"), found)
        if change.image is not None:
            place = own_picture(old)
            content = new[[member_place for _, member_place in change.members].index(place)][1]
            self._check_image(change.image, label, content, self._source.content(source[place]))
            if found is not None:
                self._check_description(change, label, found)
        self._check_the_rest(change, label, new, old, source)
        before = {name: self._source.content(old_at[name]) for name in ("json", "txt") if name in old_at}
        try:
            said = fields.fields_of_source(before.get("json"), before.get("txt"))
        except (ValueError, RecursionError) as error:
            raise Wrong(f"{label}: the json of its source does not parse", INGEST) from error
        if raw is None or found is None:
            replaced = {name: said[name] for name in fields.new_fields(change, said) if name in said}
            return json.dumps(fields.provenance(change, replaced))
        fault = fields.fault_of_fields(found, said, change)
        if fault is None and not fields.is_laid_out(raw, found):
            fault = "its json has the right fields, but not in the writer's layout"
        if fault is not None:
            raise Wrong(f"{label}: {fault}", self._fix)
        return None

    def _parsed(self, label: str, raw: bytes) -> fields.Fields:
        try:
            return fields.parsed(raw)
        except TypeError:
            raise Wrong(f"{label}: its json is not an object", self._fix) from None
        except (ValueError, RecursionError):
            raise Wrong(f"{label}: its json does not parse", self._fix) from None

    def _check_caption(self, label: str, caption: str, txt: bytes | None, found: fields.Fields | None) -> None:
        if txt is not None and txt.decode("utf-8", "replace") != caption:
            raise Wrong(f"{label}: its txt is not the new caption", self._fix)
        if found is not None and found.get("caption") != caption:
            raise Wrong(f"{label}: its json does not hold the new caption", self._fix)

    def _check_image(self, image: NewImage, label: str, picture: bytes, before: bytes) -> None:
        if picture == before:
            raise Wrong(f"{label}: its image is still the source's", self._fix)
        if hashlib.sha256(picture).hexdigest() != image.sha256:
            raise Wrong(f"{label}: its image is not the one that the table describes", self._fix)
        self._check_edits(label, image.place, picture)

    def _check_description(self, change: Change, label: str, found: fields.Fields) -> None:
        """Checks the json's fields about the new image; the other fields are checked later."""
        assert change.image is not None
        image = change.image
        for name, value in {"width": image.width, "height": image.height, "sha256": image.sha256}.items():
            if found.get(name) != value:
                said = f"is {quoted_value(found.get(name))}, but the new image's is {quoted_value(value)}"
                raise Wrong(f"{label}: its json field '{name}' {said}", self._fix)
        for name in change.boxes:
            if name in found:
                raise Wrong(f"{label}: its json still has the old image's {name}", self._fix)

    def _check_the_rest(
        self, change: Change, label: str, new: Sequence[tuple[str, bytes]], old: Sequence[str], source: Sequence[int]
    ) -> None:
        """Checks that all other members are the source's."""
        own = own_picture(old)
        for (extension, content), (_, place) in zip(new, change.members, strict=True):
            is_new = extension.lower() == "json" or (extension.lower() == "txt" and change.caption is not None)
            if is_new or (change.image is not None and place == own):
                continue
            if content != self._source.content(source[place]):
                raise Wrong(f"{label}: its member '{extension}' is not the source's", self._fix)

    def _check_edits(self, label: str, place: tuple[str, int, int], picture: bytes) -> None:
        """Checks that the edits tar is whole and holds the image at the place that the table names."""
        path, offset, size = place
        fix = edits.again(path)
        if path not in self._edits_members:
            whose = f"{label}: edits tar '{path}'"
            try:
                tar_path = self._generated.located(path)
            except (BuilderError, OSError) as error:
                raise Wrong(f"{whose}: {reason(error)}", fix) from error
            index = indexed(tar_path, whose, fix)
            if not index.has_end_mark:
                raise Wrong(f"{whose} has no end mark", fix)
            self._edits_members[path] = dict(zip(index.data.tolist(), index.size.tolist(), strict=True))
        if self._edits_members[path].get(offset) != size or self._generated.read(path, offset, size) != picture:
            raise Wrong(f"{label}: edits tar '{path}' does not hold its image at byte {offset}", fix)

    def _check_record(self, label: str, i: int, place: int) -> None:
        """Checks what surrounds a member's content: the header before it, and zeros after it."""
        fault = heads.fault_of_head(
            self._hybrid.head(i), self._source.head(place), self._hybrid.names[i], int(self._hybrid.index.size[i])
        )
        if fault is not None:
            raise Wrong(f"{label} has another header than the record that it replaces: {fault}", self._fix)
        if any(self._hybrid.behind(i)):
            raise Wrong(f"{label} is followed by bytes that are not zero", self._fix)
