"""Which variables a traced graph writes to."""

from typing import Any

# Nothing public tells reads from writes: tests/tensorflow/test_private.py.
from tensorflow.python.framework.auto_control_deps_utils import get_read_only_resource_input_indices_graph


def written(graph: Any) -> list[Any]:
    """The handles, outside the graph, of the variables that it assigns, in the functions that it calls too."""
    read_only = set(get_read_only_resource_input_indices_graph(graph))
    outside = {id(inner): outer for outer, inner in graph.captures}
    return [outside[id(inner)] for i, inner in enumerate(graph.inputs) if i not in read_only and id(inner) in outside]
