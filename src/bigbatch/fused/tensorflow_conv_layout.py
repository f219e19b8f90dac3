"""The gradients of convolutions, for XLA on a CPU, written as the one kind of convolution that is fast in a loop.

XLA has fast kernels where inputs are (examples, places, channels) and kernels (places, in, out). It transposes other
convolutions to that in a pass over the program's entry, which leaves out loops (jax-ml/jax#12868). In a loop, such as
one over micro-batches, they are ten times slower, and TensorFlow asks XLA for a layer's two gradients as such others.
XLA is slower still at a depthwise kernel's gradient: that is written as one sum for each place of the kernel.

Measured in benchmarks/tensorflow_window.md (three convolutions, XLA). It does nothing on a GPU, outside XLA, for
groups, for sizes that the graph does not know, and for depthwise kernels of `MANY` places and more.
"""

import functools
from typing import Any

import tensorflow as tf

from bigbatch.fused.tensorflow_rewrite import read, replace


@tf.autograph.experimental.do_not_convert
def with_fast_convolutions(graph: Any, gradients: Any) -> Any:
    """Makes all operations that read a convolution's gradient in `graph` read it computed so. Nothing changes on a GPU.

    Args:
        graph: a micro-batch's, that is being traced for XLA and has its backward pass.
        gradients: the results of the backward pass, nested in any way, and None.

    Returns:
        The gradients, computed so.
    """
    found = [operation for operation in graph.get_operations() if _is_slow(operation)]
    if not found or tf.config.list_logical_devices("GPU"):
        return gradients
    gradients = read(gradients)
    for operation in found:
        if operation.type in _OF_INPUTS:
            make = functools.partial(_of_inputs, operation)
        else:
            make = functools.partial(_of_each_place if operation.type in _DEPTHWISE else _of_kernel, operation)
        replace(operation.outputs[0], make)
    return gradients


_OF_INPUTS = ("Conv2DBackpropInput", "Conv3DBackpropInputV2")
_OF_KERNEL = ("Conv2DBackpropFilter", "Conv3DBackpropFilterV2")
_DEPTHWISE = ("DepthwiseConv2dNativeBackpropFilter",)  # the inputs' is fast as it is

# Places in a depthwise kernel, of which each is a term of its own in the program. Compiling more takes long.
MANY = 128


def _is_slow(operation: Any) -> bool:
    """Whether it is such a gradient, and one that is written otherwise: not of groups, and all sizes are known."""
    if operation.type not in _OF_INPUTS + _OF_KERNEL + _DEPTHWISE:
        return False
    inputs, kernel, outputs = _shapes(operation)
    if not all(shape.is_fully_defined() for shape in (inputs, kernel, outputs)):
        return False
    if operation.type in _DEPTHWISE and kernel[:2].num_elements() >= MANY:
        return False
    last = operation.get_attr("data_format") in (b"NHWC", b"NDHWC")
    return last and kernel[-2] == inputs[-1] and all(1 in (a.stride, a.dilation) for a in _axes(operation))


def _shapes(operation: Any) -> list[Any]:
    """Of the convolution's inputs, kernel and outputs."""
    made = operation.outputs[0].shape
    first, second, outputs = (x.shape for x in operation.inputs)
    return [made, second, outputs] if operation.type in _OF_INPUTS else [first, made, outputs]


class _Axis:
    """One axis of places: its sizes, the stride, the dilation, and how many zeros stand before the first."""

    def __init__(self, operation: Any, axis: int):
        inputs, kernel, outputs = _shapes(operation)
        self.size, self.outputs = inputs[axis], outputs[axis]
        self.stride, self.dilation = (operation.get_attr(name)[axis] for name in ("strides", "dilations"))
        self.span = (kernel[axis - 1] - 1) * self.dilation  # from the kernel's first place to its last
        padding = operation.get_attr("padding")
        if padding == b"EXPLICIT":
            self.before = operation.get_attr("explicit_paddings")[2 * axis]
        elif padding == b"SAME":
            self.before = max(self.reach - self.size, 0) // 2
        else:
            self.before = 0

    @property
    def reach(self) -> int:
        """How many places of the padded inputs have a part in the outputs."""
        return (self.outputs - 1) * self.stride + self.span + 1

    def read_at(self, k: int) -> slice:
        """What the kernel's place k reads of the padded inputs."""
        start = k * self.dilation
        return slice(start, start + self.reach - self.span, self.stride)


def _axes(operation: Any) -> list[_Axis]:
    return [_Axis(operation, axis) for axis in range(1, operation.outputs[0].shape.rank - 1)]


def _of_inputs(operation: Any) -> tf.Tensor:
    """Σ over kernel places k of outputs' gradients[(i + before - k · dilation) / stride] · kernel[k]ᵀ, for each i."""
    _, kernel, gradient = operation.inputs
    axes = _axes(operation)
    for axis, a in enumerate(axes, 1):
        gradient = _spread(gradient, axis, a.stride)
    margins = [(a.span - a.before, a.size + a.before - a.reach + a.span) for a in axes]
    gradient = _padded(gradient, [(0, 0), *margins, (0, 0)])
    places = list(range(len(axes)))
    mirrored = tf.reverse(kernel, places)
    kernel = tf.transpose(mirrored, [*places, len(axes) + 1, len(axes)])
    return _convolved(gradient, kernel, [1] * len(axes), [a.dilation for a in axes])


def _of_kernel(operation: Any) -> tf.Tensor:
    """Σ over examples and outputs o of inputs[o · stride + k · dilation - before]ᵀ · their gradients[o], for each k."""
    inputs, _, gradient = operation.inputs
    axes = _axes(operation)
    places = list(range(1, len(axes) + 1))
    inputs = _as_read(inputs, axes)
    # Channels stand for examples, the examples are summed over, and the gradients are the kernel.
    made = _convolved(
        tf.transpose(inputs, [len(axes) + 1, *places, 0]),
        tf.transpose(gradient, [*places, 0, len(axes) + 1]),
        [a.dilation for a in axes],
        [a.stride for a in axes],
    )
    return tf.transpose(made, [*places, 0, len(axes) + 1])


def _of_each_place(operation: Any) -> tf.Tensor:
    """The same sum for each channel by itself, whose outputs' gradients are so many in a row."""
    inputs, _, gradient = operation.inputs
    rows, columns = axes = _axes(operation)
    shape: list[Any] = operation.outputs[0].shape.as_list()
    inputs = _as_read(inputs, axes)
    gradient = tf.reshape(gradient, [*gradient.shape[:3], *shape[2:]])

    def at(i: int, j: int) -> tf.Tensor:
        here = inputs[:, rows.read_at(i), columns.read_at(j), :, None]
        return tf.reduce_sum(here * gradient, [0, 1, 2])

    return tf.stack([tf.stack([at(i, j) for j in range(shape[1])]) for i in range(shape[0])])


def _as_read(inputs: tf.Tensor, axes: list[_Axis]) -> tf.Tensor:
    """With the zeros that the convolution pads, and without places that it never reads."""
    return _padded(inputs, [(0, 0), *[(a.before, a.reach - a.size - a.before) for a in axes], (0, 0)])


def _convolved(x: tf.Tensor, kernel: tf.Tensor, strides: list[int], dilations: list[int]) -> tf.Tensor:
    convolution: Any = tf.nn.conv2d if len(strides) == 2 else tf.nn.conv3d
    return convolution(x, kernel, [1, *strides, 1], "VALID", dilations=[1, *dilations, 1])


def _spread(x: tf.Tensor, axis: int, stride: int) -> tf.Tensor:
    """With stride - 1 zeros between any two places of an axis."""
    if stride == 1:
        return x
    shape: list[Any] = x.shape.as_list()
    margins = [(0, 0)] * (len(shape) + 1)
    margins[axis + 1] = (0, stride - 1)
    shape[axis] *= stride
    spread = tf.reshape(tf.pad(tf.expand_dims(x, axis + 1), margins), shape)
    return _padded(spread, [(0, 1 - stride if i == axis else 0) for i in range(len(shape))])


def _padded(x: tf.Tensor, margins: list[tuple[int, int]]) -> tf.Tensor:
    """With zeros before and after each axis; where there are fewer than none, without so many places."""
    shape: list[Any] = x.shape.as_list()
    begin = [max(0, -before) for before, _ in margins]
    size = [n - b - max(0, -after) for n, b, (_, after) in zip(shape, begin, margins, strict=True)]
    return tf.pad(tf.slice(x, begin, size), [(max(0, before), max(0, after)) for before, after in margins])
