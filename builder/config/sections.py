"""What the sections of a pipeline file may say."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from builder.errors import ConfigError
from builder.store import layout

Param = str | int | float | bool | list[str] | list[int] | list[float]


class Strict(BaseModel):
    """A model that refuses unknown keys and does not turn one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _local(name: str) -> str:
    try:
        return layout.local(name)
    except ConfigError as error:
        raise ValueError(f"{error.what}\n{error.fix}") from None


#: A path of this machine, `~` expanded.
LocalPath = Annotated[str, AfterValidator(_local)]


class DatasetSection(Strict):
    """The source and the place of the table: keys of every kind of source."""

    #: Values of required keys that are missing, so that the rest of the pipeline can be checked.
    stand_ins: ClassVar[dict[str, Any]] = {"root": ""}

    #: The kind of source: `shards` are tars of images, captions and json.
    kind: str = "shards"
    #: Name of the dataset, for people.
    name: str = "dataset"
    #: Folder of the table, the edits and the hybrid shards.
    root: LocalPath


class Run(Strict):
    """How work is executed; `[run]` for all stages, `[stages.<name>.run]` for one."""

    #: Where tasks run; this version has `local` only.
    executor: str = "local"
    #: Worker processes; one per device for a stage that uses a GPU, or whose section names devices but not workers.
    workers: int = Field(default=2, ge=1)
    #: Most rows that a task answers without committing them: at most these are lost by a kill.
    checkpoint_rows: int = Field(default=2048, ge=1)
    #: Seconds after which a task commits.
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    #: Share of failed rows above which a task stops; checked after 100 rows.
    max_failed: float = Field(default=0.5, ge=0, le=1)
    #: Rows of one batch; the stage's own number if absent.
    batch_rows: int | None = Field(default=None, ge=1)
    #: Devices; workers take them in turn.
    devices: list[str] = Field(default=["cpu"], min_length=1)


class StageTable(BaseModel):
    """`[stages.<name>]`: keys that every stage has; the others are the stage's options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    #: Your own stage, `file.py:Class`.
    python: LocalPath | None = None
    #: The work SQL; `sql/<name>.sql` if absent.
    sql: LocalPath | None = None
    #: Values of the $names in the work SQL.
    params: dict[str, Param] = {}
    #: Keys of `[run]` that differ for this stage.
    run: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Write(Strict):
    """What the writer does."""

    #: SQL that returns the samples which differ from the source.
    select: LocalPath = "sql/write.sql"
    #: Values of the $names in that SQL.
    params: dict[str, Param] = {}
    #: Format of new pictures. source: the format of the replaced picture. jpg: always jpg; a replaced png or webp
    #: becomes a .jpg, which readers that look for one kind of picture do not find.
    image: Literal["source", "jpg"] = "source"
    #: In a sample with several pictures, what happens to those that a new one does not replace: keep or drop. Absent:
    #: such a sample is not edited.
    other_pictures: Literal["keep", "drop"] | None = None
    #: Whether an edited sample without a json gets one. Without it, how the sample was made is in the manifest.
    gives_json: bool = Field(default=False, alias="json")
    #: Folder of the hybrid shards, on another disk too; `shards` in `dataset.root` if absent.
    folder: str | None = Field(default=None, min_length=1)
