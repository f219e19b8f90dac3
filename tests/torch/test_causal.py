"""`bb.causal_items` against the loss that a causal language model of Hugging Face's computes."""

import pytest
import torch
import torch.nn.functional as F

import bigbatch.torch as bb

LABELS = torch.tensor([[3, 1, 4, 1, 5], [-100, -100, 2, 6, -100], [9, -100, -100, -100, -100]])


def test_it_counts_the_labels_that_are_compared():
    assert bb.causal_items(LABELS) == 4 + 2 + 0
    scores = torch.zeros(3, 5, 10, requires_grad=True)
    shifted = F.pad(LABELS, (0, 1), value=-100)[:, 1:]  # as transformers' ForCausalLMLoss does
    summed = F.cross_entropy(scores.flatten(0, 1), shifted.flatten(), reduction="sum")
    mean = F.cross_entropy(scores.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(summed / bb.causal_items(LABELS), mean)


def test_another_ignore_index_and_other_shapes():
    assert bb.causal_items(LABELS.clamp(min=0), ignore_index=0) == 6
    assert bb.causal_items(LABELS[0]) == 4
    assert bb.causal_items(LABELS[:, :1]) == 0
    assert bb.causal_items(LABELS.to(torch.int32)).ndim == 0


@pytest.mark.parametrize(
    ("labels", "kind"),
    [([[1, 2]], TypeError), (torch.tensor(3), ValueError), (torch.zeros(2, 3), ValueError), (LABELS > 0, ValueError)],
)
def test_what_are_no_labels_is_refused(labels, kind):
    with pytest.raises(kind, match="labels must be a tensor of integers"):
        bb.causal_items(labels)


def test_windows_of_a_model_that_shifts_are_the_whole_batches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 6), torch.nn.Linear(6, 10)).double()

    def loss_of(labels):
        scores = model(labels.clamp(min=0)).flatten(0, 1)
        return F.cross_entropy(scores, F.pad(labels, (0, 1), value=-100)[:, 1:].flatten(), ignore_index=-100)

    batch = LABELS[:2].repeat(2, 1)
    wanted = torch.autograd.grad(loss_of(batch), list(model.parameters()))
    for items, exact in ((bb.causal_items, True), (lambda labels: (labels != -100).sum(), False)):
        model.zero_grad()
        bb.backward(lambda labels, items=items: (loss_of(labels), items(labels)), batch, micro_batch=1)
        distance = max((p.grad - w).norm() / w.norm() for p, w in zip(model.parameters(), wanted, strict=True))
        assert bool(distance < 1e-12) is exact
