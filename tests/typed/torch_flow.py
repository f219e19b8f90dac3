"""PyTorch's documented flow with its types. Type checkers read this file, and nothing runs it."""

from typing import assert_type

import torch
from torch import nn

import bigbatch.torch as bb

model = nn.Linear(8, 2)
optimizer = torch.optim.AdamW(model.parameters())
x, y = torch.randn(96, 8), torch.randn(96, 2)


def loss_fn(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


assert_type(bb.backward(loss_fn, (x, y), micro_batch=32), torch.Tensor)
bb.backward(loss_fn, (x, y), micro_batch="auto")
assert_type(bb.plan(loss_fn, (x, y), memory="8GiB").micro_batch, int)

acc = bb.Accumulator(optimizer, every=bb.items(4096), clip_norm=1.0, partial="carry", nonfinite="raise")
update = acc.backward(loss_fn((x, y)), items=len(x))
assert_type(update, bb.Update | None)
if update:
    print(update.loss, update.grad_norm, update.skipped)
if tail := acc.flush():
    assert_type(tail.micro_batches, int)
acc.load_state_dict(acc.state_dict())
acc.reset()

pair = [torch.optim.SGD([model.weight], lr=1e-2), torch.optim.AdamW([model.bias])]
bb.Accumulator(pair, every=lambda update: min(64, 4 + update // 100))
