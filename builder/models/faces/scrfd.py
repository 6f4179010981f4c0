"""SCRFD face detectors from ONNX files: insightface loads and recognizes them, frames are made and read here.

Knows pixels and boxes; knows nothing of stages, columns and tables. The method is Guo, Deng, Lattas, Zafeiriou: "Sample
and Computation Redistribution for Efficient Face Detection", ICLR 2022. The steps before and after the network are
those of insightface's `SCRFD.detect`, for several pictures at once if the graph can.

The published exports, det_10g.onnx among them, say that they take one picture, and list their outputs without an axis
for pictures, in the order rows, columns, pictures, anchors. Nothing in such a graph depends on the number of pictures,
so that number is freed, and the list is taken apart.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder import machine
from builder.errors import RowError, StageError, check_packages
from builder.models.faces.detector import DetectorEntry, Floats
from builder.models.pictures import Pixels

Blobs = npt.NDArray[np.float32]
Boxes = npt.NDArray[np.float32]

#: Where insightface keeps its packs, one folder per pack.
PACKS = Path("~/.insightface/models")
#: Logged once by every worker that loads such a model.
LICENCE = (
    "insightface's pretrained face models (buffalo_l and the other packs, det_*.onnx, scrfd_*.onnx) are licensed for "
    "non-commercial research only"
)
#: Side of the square that a picture is fitted into, if neither the options nor the graph name it, px. Source:
#: insightface's default.
INPUT_PX = 640
#: A side that the largest stride does not divide would shift the cells.
GRAIN_PX = 32
#: Pictures per call on a GPU; on a CPU it is one, since more are not faster.
GPU_BATCH = 32
#: Frames that are made at a time, px of 640 x 640 as float32: 315 MB.
_FRAMES = 64
#: The network's input is (v - 127.5) / 128. Source: insightface's `SCRFD`.
_MEAN, _SCALE = 127.5, 1 / 128
#: Strides by the number of outputs: scores, boxes and perhaps landmarks of each. Source: insightface's `SCRFD`.
_STRIDES = {6: (8, 16, 32), 9: (8, 16, 32), 10: (8, 16, 32, 64, 128), 15: (8, 16, 32, 64, 128)}
#: Boxes per place, by the number of strides. Source: the same.
_ANCHORS = {3: 2, 5: 1}
#: Difference, as a share of 1 + the value, from which outputs of a picture alone and next to another are not the same:
#: rounding in TF32 is below it, another picture's values are far above.
_LEAK = 1e-2


class ScrfdFrames:
    """Room for pictures as the network takes them; each is put into its own place, in any thread."""

    def __init__(self, count: int, width: int, height: int) -> None:
        self.blobs: Blobs = np.empty((count, 3, height, width), np.float32)
        self.scales = [1.0] * count
        self.is_put = [False] * count

    def put(self, place: int, image: Pixels) -> None:
        """Fits a picture, uint8 (H, W, 3) RGB, into the top left corner of its frame; the rest is black."""
        import cv2

        height, width = self.blobs.shape[2:]
        ratio = image.shape[0] / image.shape[1]
        is_tall = ratio > height / width
        size = (max(int(height / ratio), 1), height) if is_tall else (width, max(int(width * ratio), 1))
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[: size[1], : size[0]] = cv2.resize(image, size)
        self.blobs[place] = cv2.dnn.blobFromImage(canvas, _SCALE, (width, height), (_MEAN, _MEAN, _MEAN))[0]
        self.scales[place] = size[1] / image.shape[0]
        self.is_put[place] = True


class Scrfd:
    """Finds faces in several pictures at once, or one by one if the graph takes only one.

    Args:
        model: an .onnx file, a folder with one, or the name of a pack in `PACKS`. Nothing is downloaded.
        device: `cpu`, `cuda` or `cuda:N`.
        input_px: side of the square that a picture is fitted into; the graph's fixed size, else `INPUT_PX`.
        threshold: least score of a box that is reported.
        batch: pictures per call. Every call has exactly this many, the last one with blank frames, so that an answer
            does not depend on the number of its neighbours. It is 1 if the graph takes one at a time.

    Attributes:
        why_single: why the graph takes one picture at a time, though more were asked for; None if it takes them.

    Raises:
        StageError: insightface is not installed, the model or device does not exist, or the file is not a working SCRFD
            detector.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        input_px: int | None = None,
        threshold: float = 0.5,
        batch: int | None = None,
    ) -> None:
        check_installed(model)
        import cv2

        cv2.setNumThreads(1)
        self.threshold = threshold
        providers = _providers(device)
        wanted = batch or (1 if device == "cpu" else GPU_BATCH)
        self.file, self._model = _loaded(model, providers, wanted)
        self._session = self._model.session
        if self._session.get_providers()[0] != providers[0][0]:
            raise StageError(
                f"onnxruntime cannot start {providers[0][0]} on device '{device}'",
                where={"it would take": ", ".join(self._session.get_providers())},
                fix="install the CUDA and cuDNN libraries that onnxruntime-gpu needs; its own messages are in the log",
            )
        self._input = self._session.get_inputs()[0].name
        names = [output.name for output in self._session.get_outputs()]
        self._strides = _STRIDES[len(names)]
        self._outputs = names[: 2 * len(self._strides)]  # without the landmarks
        self.width, self.height = _size(self.file, self._model.static_input_size, input_px)
        self.why_single = self._why_single(wanted)
        self.batch = 1 if self.why_single else wanted
        frames = _FRAMES * INPUT_PX**2 // (self.width * self.height)
        self.most_frames = self.batch * max(frames // self.batch, 1)

    def frames(self, count: int) -> ScrfdFrames:
        """Room for `count` pictures."""
        return ScrfdFrames(count, self.width, self.height)

    def detect(self, frames: ScrfdFrames) -> list[tuple[Floats, Floats]]:
        """Finds the faces of every picture that was put.

        Returns:
            For each place boxes, float64 (n, 4), x1, y1, x2, y2 in pixels of the picture, not clipped to it, and their
            scores, float64 (n,), best first.
        """
        found = []
        for start in range(0, len(frames.blobs), self.batch):
            places = range(start, min(start + self.batch, len(frames.blobs)))
            answers = self._run(self._filled(frames, places))
            for i, place in enumerate(places):
                if frames.is_put[place]:
                    found.append(self._faces([answer[i] for answer in answers], frames.scales[place]))
                else:
                    found.append((np.zeros((0, 4)), np.zeros(0)))
        return found

    def _filled(self, frames: ScrfdFrames, places: range) -> Blobs:
        """The frames of one call: blank ones for pictures that are not there."""
        blobs = frames.blobs[places.start : places.stop]
        for i, place in enumerate(places):
            if not frames.is_put[place]:
                blobs[i] = 0
        if len(blobs) == self.batch:
            return blobs
        return np.concatenate([blobs, np.zeros((self.batch - len(blobs), *blobs.shape[1:]), np.float32)])

    def _run(self, blobs: Blobs) -> list[npt.NDArray[np.float32]]:
        """Scores of every stride, then boxes of every stride, (n, cells, values) each."""
        answers = self._session.run(self._outputs, {self._input: blobs})
        return [
            self._apart(answer, len(blobs), stride) if answer.ndim == 2 else answer
            for answer, stride in zip(answers, self._strides * 2, strict=True)
        ]

    def _apart(self, answer: npt.NDArray[np.float32], count: int, stride: int) -> npt.NDArray[np.float32]:
        """The cells of each picture, (count, cells, values), out of a list of rows, columns, pictures, anchors."""
        places, values = self._places(stride), answer.shape[1]
        return answer.reshape(places, count, -1, values).swapaxes(0, 1).reshape(count, -1, values)

    def _places(self, stride: int) -> int:
        """Places of a frame that have cells of that stride."""
        return (self.width // stride) * (self.height // stride)

    def _faces(self, answers: Sequence[npt.NDArray[np.float32]], scale: float) -> tuple[Floats, Floats]:
        """Boxes and scores of one picture out of its outputs.

        Raises:
            ValueError: some are not numbers, which would look like no face.
        """
        levels = len(self._strides)
        if not all(np.isfinite(scores).all() for scores in answers[:levels]):
            raise RowError("not_finite", "the detector's scores have values that are not numbers")
        found = [self._level(answers[i], answers[i + levels], stride) for i, stride in enumerate(self._strides)]
        boxes = np.concatenate([boxes for boxes, _ in found]) / scale
        scores = np.concatenate([scores for _, scores in found])
        both = np.hstack([boxes, scores]).astype(np.float32)
        both = both[np.argsort(-both[:, 4], kind="stable")]
        if not np.isfinite(both).all():
            raise RowError("not_finite", "the detector's boxes have values that are not numbers")
        kept = both[self._model.nms(both)].astype(np.float64)
        return kept[:, :4], kept[:, 4]

    def _level(self, scores: Boxes, distances: Boxes, stride: int) -> tuple[Boxes, Boxes]:
        """Boxes (n, 4) in pixels of the frame and scores (n, 1) of one stride."""
        columns, rows = self.width // stride, self.height // stride
        anchors = len(scores) // (columns * rows)
        keep = np.flatnonzero(scores[:, 0] >= self.threshold)
        cell = keep // anchors
        corners = np.stack([cell % columns, cell // columns], axis=1).astype(np.float32) * stride
        sides = distances[keep] * stride
        return np.concatenate([corners - sides[:, :2], corners + sides[:, 2:]], axis=1), scores[keep]

    def _why_single(self, wanted: int) -> str | None:
        """Why `wanted` pictures cannot go through the graph together; None if they can.

        Shapes do not show it, since a graph may take two pictures and mix them. So it is tried.

        Raises:
            StageError: not even one can.
        """
        pair = _test_frames(self.width, self.height)
        try:
            alone = [self._run(pair[i : i + 1]) for i in range(2)]
        except Exception as error:
            if machine.is_of_the_machine(error):
                raise
            raise self._unfit(" ".join(str(error).split())) from error
        levels = len(self._strides)
        for i, stride in enumerate(self._strides):
            cells = self._places(stride) * _ANCHORS[levels]
            shapes = [alone[0][at].shape for at in (i, i + levels)]
            if not cells or shapes != [(1, cells, 1), (1, cells, 4)]:
                raise self._unfit(
                    f"its scores and boxes of stride {stride} have the shapes {shapes[0]} and {shapes[1]}"
                )
        if wanted == 1:
            return None
        blobs = np.zeros((wanted, *pair.shape[1:]), np.float32)
        blobs[:2] = pair
        try:
            together = self._run(blobs)
        except Exception as error:
            return f"it fails on {wanted} pictures: {' '.join(str(error).split())}"
        for i in range(2):
            for one, many in zip(alone[i], together, strict=True):
                far = _LEAK * (1 + np.abs(one[0]))
                if many.shape != (wanted, *one.shape[1:]) or (np.abs(many[i] - one[0]) > far).any():
                    return "its outputs for a picture depend on the pictures next to it"
        return None

    def _unfit(self, why: str) -> StageError:
        return StageError(
            f"the model does not work as an SCRFD detector: {why}",
            where={"file": self.file, "frame": f"{self.width} x {self.height} px"},
            fix="name another model, for example det_10g.onnx",
        )


def _providers(device: str) -> list[tuple[str, dict[str, Any]]]:
    """onnxruntime's providers for a device, best first."""
    import onnxruntime

    kind, _, number = device.partition(":")
    if device == "cpu":
        return [("CPUExecutionProvider", {})]
    if kind != "cuda" or not (number or "0").isdigit():
        raise StageError(
            f"detector 'scrfd' does not know the device '{device}'", fix="set devices to cpu, cuda, cuda:0, cuda:1 ..."
        )
    have = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in have:
        raise StageError(
            f"onnxruntime has no CUDAExecutionProvider for device '{device}'",
            where={"it has": ", ".join(have)},
            fix='install onnxruntime-gpu instead of onnxruntime, or set devices = ["cpu"]',
        )
    cuda = {"device_id": int(number or 0), "cudnn_conv_algo_search": "HEURISTIC"}  # by shape, not by a race of timings
    return [("CUDAExecutionProvider", cuda), ("CPUExecutionProvider", {})]


def check_installed(model: str) -> None:
    """Raises StageError for packages and files that the detector would miss; loads nothing."""
    check_packages("insightface", "onnx", "onnxruntime", extra="insightface", needed_by="detector 'scrfd'")
    _files(model)


def _loaded(model: str, providers: list[tuple[str, dict[str, Any]]], batch: int) -> tuple[Path, Any]:
    """The file and insightface's model of it, for several pictures per call if possible."""
    import onnxruntime
    from insightface import model_zoo

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    files = _files(model)
    for file in files:
        try:
            found = model_zoo.get_model(str(file), providers=providers, sess_options=options)
        except Exception as error:
            if machine.is_of_the_machine(error):
                raise
            raise StageError(
                f"insightface cannot load the model: {' '.join(str(error).split())}",
                where={"file": file},
                fix="name an SCRFD detector as ONNX, for example det_10g.onnx",
            ) from error
        if getattr(found, "taskname", "") == "detection" and _is_scrfd(found.session):
            fixed = found.session.get_inputs()[0].shape[0]
            if isinstance(fixed, int) and fixed != batch:
                with contextlib.suppress(Exception):  # trying it shows what the graph takes, whatever it declares
                    found.session = onnxruntime.InferenceSession(_freed(file), options, providers)
            return file, found
    raise StageError(
        f"'{model}' has no SCRFD detector",
        where={"looked at": ", ".join(file.name for file in files)},
        fix="name an ONNX file with one float32 input and 6, 9, 10 or 15 outputs, for example det_10g.onnx",
    )


def _freed(file: Path) -> bytes:
    """The graph, for any number of pictures: its input does not fix it, and no shape is left that followed from it."""
    import onnx

    model = onnx.load(str(file))
    weights = {weight.name for weight in model.graph.initializer}
    [given] = [given for given in model.graph.input if given.name not in weights]
    given.type.tensor_type.shape.dim[0].dim_param = "pictures"
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


def _is_scrfd(session: Any) -> bool:
    [first, *others] = session.get_inputs()
    return not others and first.type == "tensor(float)" and len(session.get_outputs()) in _STRIDES


def _files(model: str) -> list[Path]:
    """The ONNX files of a model's name, likely detectors first.

    Raises:
        StageError: there are none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return [path]
    folder = path if path.is_dir() or path.suffix == ".onnx" else PACKS.expanduser() / model
    files = sorted(folder.glob("*.onnx"), key=lambda file: (not file.name.startswith(("det", "scrfd")), file.name))
    if not files:
        raise StageError(
            f"there is no face model '{model}'",
            where={"looked for": folder if path.suffix == ".onnx" else folder / "*.onnx"},
            fix='put the file there, or name another with model = "FILE.onnx"; builder downloads no models',
        )
    return files


def _size(file: Path, fixed: tuple[int, int] | None, input_px: int | None) -> tuple[int, int]:
    """Width and height of a frame."""
    if fixed is None:
        return (input_px or INPUT_PX, input_px or INPUT_PX)
    if input_px is not None and fixed != (input_px, input_px):
        raise StageError(
            f"input_px is {input_px}, but the graph takes {fixed[0]} x {fixed[1]} px alone",
            where={"file": file},
            fix="leave input_px out",
        )
    return int(fixed[0]), int(fixed[1])


def _test_frames(width: int, height: int) -> Blobs:
    """Two different frames of large blocks in full colours: (2, 3, height, width)."""
    block = 32
    grid = (2, 3, -(-height // block), -(-width // block))
    signs = np.random.default_rng(0).integers(0, 2, grid) * 2 - 1
    frames = np.kron(signs, np.ones((block, block)))[:, :, :height, :width]
    return np.ascontiguousarray(frames, np.float32)


# The detector of the table in `detectors`


def _start(
    *, device: str, name: str, model: str, input_px: int | None, threshold: float, detector_batch: int | None
) -> Scrfd:
    scrfd = Scrfd(model, device=device, input_px=input_px, threshold=threshold, batch=detector_batch)
    print(f"{name}: {scrfd.file} ({LICENCE})", file=sys.stderr, flush=True)
    if scrfd.why_single:
        print(f"{name}: {scrfd.file.name} gets one picture at a time: {scrfd.why_single}", file=sys.stderr, flush=True)
    return scrfd


def _check(*, model: str, input_px: int | None, threshold: float, detector_batch: int | None) -> None:
    check_installed(model)


ENTRY = DetectorEntry(
    _start,
    _check,
    frozenset({"model", "input_px", "threshold", "detector_batch"}),
    min_score=0.5,
    batch_rows=64,
    packages=("insightface", "onnx", "onnxruntime", "opencv-python", "simplejpeg"),
    ahead=2,
    tolerance=0.001,  # all calls have one size, but a GPU may add up in another order
    takes_device=True,
    notice=LICENCE,
)
