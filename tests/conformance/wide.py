"""The jobs "mean", "net" and "dropout" on matrices so large that their gradients wait as products on TensorFlow.

Each parameter lies in the corner of a square matrix, and the data in the first columns of a wide one, among zeros.
Those zeros stay: their gradients are zero, and so is what any of the laws' optimizers makes of them.
"""

import numpy as np

WIDTH = 128  # a product of up to eight rows is then small enough beside what it comes to


def is_wide(job):
    return job != "missing"  # which has no matrix


def widened(name, value):
    """The array in the corner of one of WIDTH."""
    made = np.zeros([WIDTH] if name == "b" else [WIDTH, WIDTH])
    corner = made if value.ndim == made.ndim else made[:, 0]
    corner[tuple(map(slice, value.shape))] = value
    return made


def narrowed(values, params):
    """The corners, as large as `params`, of parameters or of anything else of their size, such as their gradients."""
    return {name: None if v is None else _corner(np.asarray(v), params[name].shape) for name, v in values.items()}


def _corner(value, shape):
    return (value if value.ndim == len(shape) else value[:, 0])[tuple(map(slice, shape))]
