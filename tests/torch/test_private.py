"""What this package takes from PyTorch that PyTorch does not promise: each is there, and does what is relied on.

Those of DistributedDataParallel are in tests/ranks/test_flags.py, those of `fully_shard` in tests/ranks/test_fsdp2.py.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bigbatch.engines.torch_hooks import foreign_hooks, has_hooks, register
from bigbatch.engines.torch_leaves import sequence_now
from bigbatch.fused.torch_graph import is_compiled
from bigbatch.fused.torch_proof import signed
from bigbatch.torch import scaling
from conformance.torch_products import takes_products


@pytest.fixture
def p():
    return nn.Parameter(torch.ones(2, 2))


def test_every_hook_takes_the_next_number(p):
    before, ours = RemovableHandle.next_id, foreign_hooks()
    handle = p.register_hook(lambda g: None)
    assert RemovableHandle.next_id == before + 1
    assert foreign_hooks() == ours + 1
    handle.remove()
    node = torch.autograd.graph.get_gradient_edge(p).node
    assert not has_hooks(node)
    assert foreign_hooks() == ours + 1, "ours are counted apart"
    handle = register(node.register_prehook, lambda grads: None)
    assert has_hooks(node)
    handle.remove()


def test_where_hooks_on_gradients_are(p):
    assert p._backward_hooks is None
    handle = p.register_hook(lambda g: None)
    assert len(p._backward_hooks) == 1
    p._backward_hooks = None  # an audit sets it, and restores it
    handle.remove()


def test_where_hooks_after_the_accumulation_are_and_that_they_can_be_exchanged(p):
    called = []
    assert p._post_accumulate_grad_hooks is None
    p.register_post_accumulate_grad_hook(called.append)
    hooks = p._post_accumulate_grad_hooks
    assert list(hooks.values()) == [called.append]
    p._post_accumulate_grad_hooks = {0: lambda q: called.append("another")}
    p.sum().backward()
    p._post_accumulate_grad_hooks = hooks
    p.sum().backward()
    assert called[0] == "another"
    assert called[1] is p


def test_every_write_counts_up(p):
    p.sum().backward()
    version = p.grad._version
    p.grad.zero_()
    assert p.grad._version == version + 1


def test_nodes_have_numbers_and_the_dtypes_of_their_gradients(p):
    copied = p.to(torch.float64)
    assert copied.grad_fn._input_metadata[0].dtype == torch.float64
    assert copied.grad_fn._sequence_nr() < p.t().grad_fn._sequence_nr() < sequence_now()


def test_nodes_name_how_a_weight_was_transposed(p):
    assert type(p.t().grad_fn).__name__ == "TBackward0"
    assert p.permute(1, 0).grad_fn._saved_dims == (1, 0)
    node = p.transpose(0, 1).grad_fn
    assert (node._saved_dim0 - node._saved_dim1) % 2 == 1
    assert type(p.to(torch.float64).grad_fn).__name__ == "ToCopyBackward0"


@takes_products
def test_nodes_have_what_they_saved_and_its_hooks(p):
    x = torch.ones(1, 2)
    node = (x @ p).grad_fn
    assert torch.equal(node._saved_self, x)
    assert node._raw_saved_self.unpack_hook is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert (x @ p).grad_fn._raw_saved_self.unpack_hook is not None
    added = torch.addmm(torch.ones(2), x, p, alpha=2).grad_fn
    assert torch.equal(added._saved_mat1, x)
    assert added._saved_alpha == 2
    looked_up = F.embedding(torch.tensor([1]), p).grad_fn
    assert looked_up._saved_indices.tolist() == [1]
    assert signed(looked_up._saved_padding_idx) == -1
    assert (looked_up._saved_scale_grad_by_freq, looked_up._saved_sparse) == (False, False)


def test_compiled_autograd_sets_a_flag(monkeypatch):
    import torch._dynamo.compiled_autograd as module

    assert sys.modules["torch._dynamo.compiled_autograd"] is module
    assert module.compiled_autograd_enabled is False
    assert not is_compiled()
    monkeypatch.setattr(module, "compiled_autograd_enabled", True)
    assert is_compiled()


def test_a_scaler_has_new_states_after_each_update_and_only_then(p):
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    mark = scaling.mark_of(scaler)
    assert mark is scaler._per_optimizer_states
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert scaling.mark_of(scaler) is mark
    scaler.update()
    assert scaling.mark_of(scaler) is not mark


def test_a_mode_sees_operations_and_their_schemas_and_can_be_passed_by():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend((func._schema.name, a.name) for a in func._schema.arguments if a.alias_info is not None)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        x.add_(1)
        with no_dispatch():
            x.mul_(2)
    assert seen == [("aten::add_", "self")]
    assert tree_leaves(({"a": 1}, [2])) == [1, 2]
    assert tree_map_only(int, lambda n: n + 1, [1, "a"]) == [2, "a"]


def test_fake_tensors_have_shapes_and_no_memory():
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.ones(3, 2))
    with mode:
        product = fake @ torch.empty(2, 1 << 40)
    assert isinstance(product, FakeTensor)
    assert product.shape == (3, 1 << 40)


def test_tensors_are_weak_keys_by_identity(p):
    known = WeakTensorKeyDictionary()
    known[p] = True
    assert p in known
    assert nn.Parameter(torch.ones(2, 2)) not in known
    del p
