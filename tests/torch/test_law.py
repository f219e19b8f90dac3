"""The law on tensors."""

import torch

from bigbatch import law


def test_the_law_on_tensors():
    g = law.mean([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 8.0])], [3, 1])
    assert g.tolist() == [1.5, 5.0]
    loss = law.mean([torch.tensor(1.0), torch.tensor(3.0)], torch.tensor([3, 1]))
    assert loss.item() == 1.5
