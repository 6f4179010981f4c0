"""The table of detectors, and the options of a stage that detects faces.

A new detector is a file with its `DetectorEntry`, and its name and options here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from builder.config.sections import Strict
from builder.errors import ConfigError
from builder.models.faces import mtcnn, scrfd
from builder.models.faces.detector import DetectorEntry
from builder.models.faces.scrfd import GRAIN_PX

#: Every value of the option `detector`.
DETECTORS: dict[str, DetectorEntry] = {"mtcnn": mtcnn.ENTRY, "scrfd": scrfd.ENTRY}
#: Packages whose versions decide what some detector finds.
FACE_PACKAGES = tuple(sorted({package for entry in DETECTORS.values() for package in entry.packages}))
#: Options that every detector has. Any other is refused unless the configured detector reads it.
COMMON = frozenset({"detector", "min_score", "min_size", "decode_threads"})


class DetectorOptions(Strict):
    """Options of a stage that detects faces."""

    #: mtcnn: embedded, CPU; scrfd: insightface's detectors on onnxruntime, CPU or GPU.
    detector: Literal["mtcnn", "scrfd"] = "mtcnn"
    #: Score from which a box counts as a face; absent: 0.9 for mtcnn, 0.5 for scrfd.
    min_score: float | None = Field(default=None, ge=0, le=1)
    #: Size from which a box counts: its long side as a share of the picture's long side.
    min_size: float = Field(default=0.03, ge=0, le=1)
    #: mtcnn: the smallest face that it looks for, px; absent: 4.5 % of a picture's long side, at least 12, at most 20.
    min_face_px: int | None = Field(default=None, ge=12)
    #: scrfd: an .onnx file, a folder with one, or a pack in ~/.insightface/models; nothing is downloaded.
    model: str = "buffalo_l"
    #: scrfd: side of the square that a picture is fitted into, px; absent: the model's fixed size, else 640.
    input_px: int | None = Field(default=None, ge=GRAIN_PX, multiple_of=GRAIN_PX)
    #: scrfd: least score of a box that is reported.
    threshold: float = Field(default=0.3, ge=0, le=1)
    #: scrfd: pictures per call, if the model takes several; absent: 1 on a CPU, 32 on a GPU.
    detector_batch: int | None = Field(default=None, ge=1, le=1024)
    #: Threads that decode pictures ahead; absent: 1 on a CPU, as many as there are cores on a GPU.
    decode_threads: int | None = Field(default=None, ge=1, le=256, json_schema_extra={"decides": False})


def read_options(options: DetectorOptions) -> dict[str, Any]:
    """The options that only the configured detector reads, by name."""
    return {name: getattr(options, name) for name in DETECTORS[options.detector].reads}


def check_options(options: DetectorOptions, stage: str) -> None:
    """Refuses options of other detectors.

    Args:
        stage: the name of the section that the options are in.

    Raises:
        ConfigError: one is set that the configured detector does not read.
    """
    own = COMMON | DETECTORS[options.detector].reads
    for name, field in DetectorOptions.model_fields.items():
        if name in own or getattr(options, name) == field.default:
            continue
        readers = [f'detector = "{detector}"' for detector, entry in DETECTORS.items() if name in entry.reads]
        fix = f"set {' or '.join(readers)} in [stages.{stage}], or leave {name} out" if readers else f"leave {name} out"
        raise ConfigError(f"{name} is set, but detector = '{options.detector}' does not read it", fix=fix)


def check_installed(options: DetectorOptions) -> None:
    """Raises StageError for packages and files that the configured detector would miss; loads nothing."""
    DETECTORS[options.detector].check(**read_options(options))
