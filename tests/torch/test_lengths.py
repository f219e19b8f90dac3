"""Micro-batches by tokens: the untrimmed full batch's update, whatever the padding, and errors where there is none."""

import math
import warnings

import pytest
import torch
from torch import nn

import bigbatch.torch as bb

IGNORED = -100
WORDS, WIDTH = 23, 8


def lognormal(n, longest, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [max(2, min(longest, int(math.exp(1.6 + 0.8 * z)))) for z in torch.randn(n, generator=draw).tolist()]


def padded(lengths, width, on_the_left=False):
    """Documents of these lengths, as a tokenizer pads them: ids, mask, labels, and one label an example."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        there = slice(width - length, width) if on_the_left else slice(length)
        ids[row, there] = torch.randint(1, WORDS, (length,), generator=draw)
        mask[row, there] = 1
    labels = ids.masked_fill(mask == 0, IGNORED)
    return {"ids": ids, "mask": mask, "labels": labels, "topic": torch.arange(len(lengths)) % 3}


class Attending(nn.Module):
    """One layer of attention over the tokens that the mask has, with positions counted by the mask."""

    def __init__(self, causal=False):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head, self.topics = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WORDS), nn.Linear(WIDTH, 3)
        self.causal = causal

    def forward(self, ids, mask):
        x = self.words(ids) + self.places((mask.cumsum(1) - 1).clamp(min=0))
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = mask[:, None, :].bool().expand(-1, ids.shape[1], -1)
        if self.causal:
            seen = seen.tril()
        seen = seen | torch.eye(ids.shape[1], dtype=torch.bool)  # padding sees itself alone, however much there is
        scores = (q @ k.mT).masked_fill(~seen, -1e9).softmax(-1)
        return x + scores @ v


def causal(model, batch):
    logits = model.head(model(batch["ids"], batch["mask"]))[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return loss, (labels != IGNORED).sum()


def masked(model, batch):
    loss = nn.functional.cross_entropy(
        model.head(model(batch["ids"], batch["mask"])).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    )
    return loss, (batch["labels"] != IGNORED).sum()


def classified(model, batch):
    counts = batch["mask"][..., None]
    pooled = (model(batch["ids"], batch["mask"]) * counts).sum(1) / counts.sum(1)
    return nn.functional.cross_entropy(model.topics(pooled), batch["topic"]), len(pooled)


class Recurrent(nn.Module):
    """An RNN that packs what it is given, by the mask; padding on the right."""

    def __init__(self):
        super().__init__()
        self.words, self.rnn, self.topics = nn.Embedding(WORDS, WIDTH), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def __call__(self, ids, mask):
        rows = nn.utils.rnn.pack_padded_sequence(self.words(ids), mask.sum(1), batch_first=True, enforce_sorted=False)
        return self.rnn(rows)[1][0]


def recurrent(model, batch):
    return nn.functional.cross_entropy(model.topics(model(batch["ids"], batch["mask"])), batch["topic"]), len(
        batch["ids"]
    )


def gradients(model, run):
    model.zero_grad()
    loss = run()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


def same(model, loss_fn, batch, micro_batch, tolerance=1e-12):
    def full():
        loss = loss_fn(batch)[0]
        loss.backward()
        return loss.detach()

    wanted, right = gradients(model, full)
    loss, got = gradients(model, lambda: bb.backward(loss_fn, batch, micro_batch=micro_batch))
    assert abs(loss - wanted) <= tolerance * abs(wanted)
    assert len(got) == len(right)
    for g, r in zip(got, right, strict=True):
        assert (g - r).norm() <= tolerance * max(1.0, r.norm().item())


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("order", ["length", "given"])
@pytest.mark.parametrize("on_the_left", [False, True])
@pytest.mark.parametrize(("loss", "is_causal"), [(causal, True), (masked, False), (classified, False)])
def test_the_update_is_the_untrimmed_full_batchs(loss, is_causal, on_the_left, order):
    model = Attending(is_causal)
    batch = padded(lognormal(13, 30), 32, on_the_left)
    tokens = bb.tokens(64, mask="mask", order=order)
    same(model, lambda part: loss(model, part), batch, tokens)


def test_a_recurrent_model_by_lengths_and_by_a_function():
    model, lengths = Recurrent(), lognormal(9, 20)
    batch = {**padded(lengths, 20), "lengths": torch.tensor(lengths)}
    for given in ("lengths", lengths, lambda batch: batch["mask"].sum(1)):
        same(model, lambda part: recurrent(model, part), batch, bb.tokens(40, lengths=given, multiple_of=1))


def test_float32_within_rounding():
    torch.set_default_dtype(torch.float32)
    model = Attending(causal=True)
    same(model, lambda part: causal(model, part), padded(lognormal(40, 30), 32), bb.tokens(64, mask="mask"), 1e-6)


def test_an_encoder_and_a_decoder_have_a_side_each():
    """The decoder's leaves are longer than the mask, and stay whole."""
    model = Attending()
    source, target = padded(lognormal(8, 16), 16), padded(lognormal(8, 20, seed=3), 24)
    batch = {"source": source, "mask": source["mask"], "target": target}

    def loss_fn(part):
        context = model(part["source"]["ids"], part["source"]["mask"])
        pooled = (context * part["mask"][..., None]).sum(1) / part["mask"].sum(1, keepdim=True)
        logits = model.head(model(part["target"]["ids"], part["target"]["mask"]) + pooled[:, None])
        labels = part["target"]["labels"]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return loss, (labels != IGNORED).sum()

    same(model, loss_fn, batch, bb.tokens(48, mask="mask"))


@pytest.mark.parametrize("on_the_left", [False, True])
def test_the_cuts_hold_every_token_once_and_no_more_than_they_may(on_the_left):
    batch = padded(lognormal(30, 32), 32, on_the_left)
    batch["names"] = [f"document {i}" for i in range(30)]
    parts = list(bb.micro_batches(batch, bb.tokens(96, mask="mask")))
    assert sum(int(part["mask"].sum()) for part in parts) == int(batch["mask"].sum())
    assert sorted(name for part in parts for name in part["names"]) == sorted(batch["names"])
    for part in parts:
        assert part["ids"].shape == part["labels"].shape == part["mask"].shape
        assert part["ids"].numel() <= 96
        for name, ids in zip(part["names"], part["ids"], strict=True):
            whole = batch["ids"][int(name.split()[1])]
            assert ids.tolist() == (whole[-len(ids) :] if on_the_left else whole[: len(ids)]).tolist()
    computed = sum(part["ids"].numel() for part in parts)
    assert computed < 0.6 * batch["ids"].numel()


def test_the_stream_makes_the_same_update():
    model = Attending(causal=True)
    batch, tokens = padded(lognormal(12, 30), 32), bb.tokens(64, mask="mask")
    _, split = gradients(model, lambda: bb.backward(lambda part: causal(model, part), batch, micro_batch=tokens))
    split = [g.clone() for g in split]
    model.zero_grad()
    grads = bb.Gradients(model.parameters())
    for part in bb.micro_batches(batch, tokens):
        loss, items = causal(model, part)
        grads.backward(loss, items=items)
    grads.flush()
    for g, r in zip((p.grad for p in model.parameters() if p.grad is not None), split, strict=True):
        assert (g - r).norm() <= 1e-12 * max(1.0, r.norm().item())


def test_a_list_of_examples_is_padded_a_micro_batch_at_a_time():
    documents = [{"ids": list(range(1, n + 1))} for n in (3, 17, 4, 2)]

    def collate(examples):
        width = max(len(e["ids"]) for e in examples)
        return torch.tensor([e["ids"] + [0] * (width - len(e["ids"])) for e in examples])

    for lengths in ("ids", lambda example: len(example["ids"])):
        parts = list(bb.micro_batches(documents, bb.tokens(17, lengths=lengths, multiple_of=1), collate=collate))
        assert [tuple(part.shape) for part in parts] == [(1, 17), (1, 4), (2, 3)]


def test_a_mask_with_holes_keeps_the_example_whole():
    batch = padded([6, 3], 8)
    batch["mask"][0, 2:4] = 0
    (part, other) = bb.micro_batches(batch, bb.tokens(6, mask="mask", multiple_of=1))
    assert part["ids"].tolist() == batch["ids"][:1, :6].tolist()
    assert other["ids"].shape == (1, 3)


def test_trim_names_what_is_a_sequence():
    batch = padded([3, 8], 8)
    batch["features"] = torch.ones(2, 8)  # as wide as the batch is long, and no sequence
    tokens = bb.tokens(8, mask="mask", multiple_of=1, trim=["ids", "mask", "labels"])
    assert [part["features"].shape[1] for part in bb.micro_batches(batch, tokens)] == [8, 8]
    with pytest.raises(ValueError, match="'topic' is none of"):
        bb.micro_batches(batch, bb.tokens(8, mask="mask", trim=["topic"]))


def test_auto_plans_the_tokens_and_halves_them_when_memory_runs_out(caplog):
    model, batch, seen = Attending(causal=True), padded(lognormal(12, 30), 32), []

    def loss_fn(part):
        if type(part["ids"]) is torch.Tensor:  # and not of a dry run
            seen.append(part["ids"].numel())
            if len(seen) == 1:
                raise torch.OutOfMemoryError("out of memory")
        return causal(model, part)

    same(model, lambda part: causal(model, part), batch, bb.tokens("auto", mask="mask"))
    bb.backward(loss_fn, batch, micro_batch=bb.tokens("auto", mask="mask"))
    assert "is run again" in caplog.text
    assert max(seen[1:]) <= 12 * 32 / 2


def test_what_is_refused_leaves_the_gradients():
    model, batch = Attending(), padded([3, 5, 8], 8)
    before = torch.ones_like(model.head.weight)
    model.head.weight.grad = before

    def run(tokens, batch=batch, loss_fn=lambda part: masked(model, part)):
        return lambda: bb.backward(loss_fn, batch, micro_batch=tokens)

    empty = {**batch, "mask": batch["mask"] * torch.tensor([[1], [0], [1]])}
    for wrong, message in [
        (run(bb.tokens(2, mask="mask", multiple_of=1)), "smaller than the shortest example. Received: most=2"),
        (run(bb.tokens(16, mask="attention_mask")), r"holds no 'attention_mask'.*\['ids', 'mask'"),
        (run(bb.tokens(16, mask="mask"), empty), "at least one token. Received: tokens of example"),
        (run(bb.tokens(16, lengths=[3, 5])), "Received: 2 lengths for 3 examples"),
        (run(bb.tokens(16, lengths=[3, 5, 9])), "longer than the batch"),
        (run(bb.tokens(16, mask="topic")), "tokens along dimension 1"),
        (run(bb.tokens(16, mask="mask"), loss_fn=lambda part: masked(model, part)[0]), r"must return \(loss, items\)"),
        (lambda: bb.micro_batches(batch, bb.tokens("auto", mask="mask")), "needs the loss to plan for"),
        (lambda: bb.micro_batches(batch, 16), "made by bb.tokens. Received: tokens=16"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()
        assert model.head.weight.grad is before


def test_an_example_longer_than_the_budget_goes_alone_with_one_warning():
    batch = padded([20, 3, 4, 18], 24)
    with pytest.warns(UserWarning, match="2 of 4 examples are longer than most=16") as caught:
        parts = list(bb.micro_batches(batch, bb.tokens(16, mask="mask")))
    assert len(caught) == 1
    assert sorted(len(part["ids"]) for part in parts) == [1, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(bb.micro_batches(batch, bb.tokens(24, mask="mask")))
