"""A detector of 4 KB with SCRFD's inputs and outputs, which takes magenta for faces; no weights of anyone's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

#: How the outputs lie: (cells, values), those of several pictures in turn, as in insightface's det_10g.onnx; with a
#: true axis for pictures in front; and with such an axis whose values are of all pictures mixed.
Form = Literal["flat", "batched", "leaking"]
STRIDES = (8, 16, 32)
#: By stride: a face where the mean colour of a cell is magenta. -30 silences a stride.
BIASES = {8: (-30.0, -30.0), 16: (-8.0, -9.0), 32: (-30.0, -30.0)}
LANDMARKS = (-1, -1, 1, -1, 0, 0, -1, 1, 1, 1)


def magenta(width: int, height: int, squares: Sequence[tuple[int, int, int, int]]) -> bytes:
    """A grey PNG with magenta boxes, x1, y1, x2, y2."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    for x1, y1, x2, y2 in squares:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=(255, 0, 255))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_toy(path: Path, form: Form = "flat", *, size: int | None = None, fixed_batch: int | None = None) -> Path:
    """Writes the detector; `size` fixes its input, px, and `fixed_batch` the number of pictures that it says to take.

    A flat one whose batch is fixed says the sizes of its outputs for one frame of 640 px, as det_10g.onnx does.
    """
    nodes, weights = [], []

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    names: dict[str, list[str]] = {"score": [], "box": [], "landmark": []}
    for stride in STRIDES:
        nodes.append(
            helper.make_node(
                "AveragePool", ["input"], [f"cells{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            )
        )
        score = np.tile(np.array([4, -4, 4], np.float32), (2, 1))
        heads = {
            "score": (score, np.array(BIASES[stride], np.float32)),
            "box": (np.zeros((8, 3), np.float32), np.full(8, 2, np.float32)),
            "landmark": (np.zeros((20, 3), np.float32), np.tile(np.array(LANDMARKS, np.float32), 2)),
        }
        for kind, (weight, bias) in heads.items():
            out = f"{kind}{stride}"
            w = constant(f"{out}_w", weight[:, :, None, None])
            b = constant(f"{out}_b", bias)
            nodes.append(helper.make_node("Conv", [f"cells{stride}", w, b], [f"{out}_conv"], kernel_shape=[1, 1]))
            # (n, c, h, w) to (h, w, n, c) as the flat exports do, or to (n, h, w, c)
            order = [0, 2, 3, 1] if form == "batched" else [2, 3, 0, 1]
            nodes.append(helper.make_node("Transpose", [f"{out}_conv"], [f"{out}_cells"], perm=order))
            values = len(bias) // 2
            if form == "flat":
                shape = constant(f"{out}_shape", np.array([-1, values], np.int64))
            else:
                nodes.append(helper.make_node("Shape", ["input"], [f"{out}_n"], start=0, end=1))
                rest = constant(f"{out}_rest", np.array([-1, values], np.int64))
                nodes.append(helper.make_node("Concat", [f"{out}_n", rest], [f"{out}_shape"], axis=0))
                shape = f"{out}_shape"
            last = f"{out}_logit" if kind == "score" else out
            nodes.append(helper.make_node("Reshape", [f"{out}_cells", shape], [last]))
            if kind == "score":
                nodes.append(helper.make_node("Sigmoid", [last], [out]))
            names[kind].append(out)
    widths = {"score": 1, "box": 4, "landmark": 10}
    batch: str | int = fixed_batch or "n"
    outputs = []
    for kind, made in names.items():
        for name, stride in zip(made, STRIDES, strict=True):
            cells: str | int = 2 * (640 // stride) ** 2 if form == "flat" and fixed_batch else f"{name}_cells"
            shape = [*([] if form == "flat" else [batch]), cells, widths[kind]]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    sides: list[str | int] = [size, size] if size else ["h", "w"]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, *sides])
    graph = helper.make_graph(nodes, "toy", [given], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
