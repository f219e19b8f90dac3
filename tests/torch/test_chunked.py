"""`chunked`: the values and gradients of the function itself, for losses that compare all examples of a batch."""

import copy
import functools
import importlib
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from bigbatch.host import Memory

N = 11
F64 = torch.float64


class Encoder(nn.Module):
    def __init__(self, drop=0.0, norm=False):
        super().__init__()
        self.a, self.b = nn.Linear(5, 64, dtype=F64), nn.Linear(64, 3, dtype=F64)
        self.norm = nn.BatchNorm1d(64, dtype=F64) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


@pytest.fixture
def towers():
    torch.manual_seed(0)
    x, y = torch.randn(2, N, 5, dtype=F64)
    return Encoder(), Encoder(), nn.Parameter(torch.tensor(0.7, dtype=F64)), x.requires_grad_(), y


def info_nce(a, b, scale):
    logits = scale.exp() * F.normalize(a) @ F.normalize(b).T
    places = torch.arange(len(a))
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def siglip(a, b, scale):
    signs = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -F.logsigmoid(signs * (scale.exp() * F.normalize(a) @ F.normalize(b).T - 1)).mean()


def supervised(a, b, scale):
    labels, own = torch.arange(len(a)) % 3, torch.eye(len(a), dtype=torch.bool)
    same = (labels[:, None] == labels) & ~own
    logits = (scale.exp() * F.normalize(a) @ F.normalize(a).T).masked_fill(own, -1e9)
    return -(logits.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean() + (b**2).mean()


def triplet(a, b, scale):
    distances = ((a[:, None] - b) ** 2).sum(-1)
    hardest = distances.masked_fill(torch.eye(len(a), dtype=torch.bool), torch.inf).amin(1)
    return F.softplus(distances.diag() - hardest + scale).mean()


def barlow(a, b, scale):
    a, b = ((x - x.mean(0)) / (x.std(0) + 0.1) for x in (a, b))
    return ((scale.exp() * a.T @ b / len(a) - torch.eye(a.shape[1], dtype=a.dtype)) ** 2).sum()


def vicreg(a, b, scale):
    covariance = a.T.cov()
    off_diagonal = covariance - covariance.diag().diag()
    return ((a - b) ** 2).mean() + F.relu(1 - a.std(0)).mean() + scale.exp() * (off_diagonal**2).sum()


def ranking(a, b, scale):
    scores, order = (a * b).sum(1), torch.arange(len(a))
    return F.softplus((scores - scores[:, None]) * torch.sign(order[:, None] - order) * scale).mean()


LOSSES = [info_nce, siglip, supervised, triplet, barlow, vicreg, ranking]


def gradients(loss, towers, change, tied=False):
    """The loss and all gradients, with each encoder as `change` makes it."""
    a, b, scale, x, y = towers
    given = [*a.parameters(), *b.parameters(), scale, x]
    for p in given:
        p.grad = None
    value = loss(change(a)(x), change(a if tied else b)(y), scale)
    value.backward()
    return [value.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in given]


def agree(got, right, relative=1e-12):
    largest = max(float(r.abs().max()) for r in right)
    for g, r in zip(got, right, strict=True):  # the bias in front of a normalization has rounding for a gradient
        assert (g - r).abs().max() <= relative * max(1e-3 * largest, float(r.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_full_batchs_gradient(loss, tied, towers):
    right = gradients(loss, towers, lambda model: model, tied)
    agree(gradients(loss, towers, lambda model: bb.chunked(model, micro_batch=4), tied), right)


@pytest.mark.parametrize("keep", [0, 1, 2, 20])
@pytest.mark.parametrize("micro_batch", [1, 3, 10, 11, 50])
def test_any_cut_and_any_number_of_kept_pieces(micro_batch, keep, towers):
    right = gradients(info_nce, towers, lambda model: model)
    agree(gradients(info_nce, towers, lambda model: bb.chunked(model, micro_batch=micro_batch, keep=keep)), right)


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_how_often_it_runs(keep, towers):
    calls = []
    towers[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    out = bb.chunked(towers[0], micro_batch=4, keep=keep)(towers[3])
    before = len(calls)
    out.sum().backward()
    assert (before, len(calls) - before) == (3, {0: 3, 1: 2, 20: 0}[keep])


@pytest.mark.parametrize("closing", ["module", "function", "method", "partial", "list"])
def test_modules_are_found(closing, towers):
    a = towers[0]
    both = [a]
    forms = {
        "module": a,
        "function": lambda x: a(x),
        "method": a.forward,
        "partial": functools.partial(lambda m, x: m(x), a),
        "list": lambda x: both[0](x),
    }
    right = gradients(info_nce, towers, lambda model: model)
    agree(
        gradients(info_nce, towers, lambda model: bb.chunked(forms[closing] if model is a else model, micro_batch=4)),
        right,
    )


@pytest.mark.parametrize("keep", [0, 9])
def test_dropout_is_that_of_the_same_pieces_without_recomputation(keep):
    def run(change):
        torch.manual_seed(0)
        model, x = Encoder(drop=0.5), torch.randn(N, 5, dtype=F64, requires_grad=True)
        torch.manual_seed(1)
        out = change(model)(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in model.parameters()), torch.rand(3)]

    ours = run(lambda model: bb.chunked(model, micro_batch=4, keep=keep))
    pieces = run(lambda model: lambda x: torch.cat([model(part) for part in x.split(4)]))
    for k, (a, b) in enumerate(zip(ours, pieces, strict=True)):
        assert torch.equal(a, b) if k in (0, 1, len(ours) - 1) else torch.allclose(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_buffers_move_once(keep):
    torch.manual_seed(0)
    model, x = Encoder(norm=True), torch.randn(12, 5, dtype=F64)
    plain = copy.deepcopy(model)
    bb.chunked(model, micro_batch=4, keep=keep)(x).square().sum().backward()
    torch.cat([plain(part) for part in x.split(4)]).square().sum().backward()
    for ours, right in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, right)
    agree([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_modes_are_those_of_the_first_run():
    model = Encoder(drop=0.5).eval()
    x = torch.randn(N, 5, dtype=F64)
    out = bb.chunked(model, micro_batch=4)(x)
    model.train()
    out.sum().backward()
    assert model.training
    ours = [p.grad.clone() for p in model.parameters()]
    model.eval().zero_grad()
    model(x).sum().backward()
    agree(ours, [p.grad for p in model.parameters()])


def test_autocast_is_that_of_the_first_run():
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = bb.chunked(model, micro_batch=8)(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    ours, model.weight.grad = model.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(x)
    assert torch.equal(out, whole)
    whole.float().square().sum().backward()
    torch.testing.assert_close(ours, model.weight.grad, rtol=2**-6, atol=2**-6 * float(model.weight.grad.abs().max()))


def test_gradients_of_16_bit_parameters_add_up_in_float32():
    def gradient(**options):
        w = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        x = torch.full((4096, 1), 2.0**-6, dtype=torch.bfloat16)
        bb.chunked(w, micro_batch=1, **options)(x).float().sum().backward()
        return w.weight.grad

    wide = gradient()
    assert wide.item() == 64
    assert wide.dtype == torch.bfloat16
    assert gradient(dtype=None).item() < 16, "sums in bfloat16 stop growing"


def test_rows_of_a_matrix_and_arguments_given_whole(towers):
    q, keys = (torch.randn(N, 5, dtype=F64, requires_grad=True) for _ in range(2))
    labels = torch.arange(N)

    def row_loss(q, labels, keys):
        return F.cross_entropy(q @ keys.T, labels, reduction="none")

    bb.chunked(row_loss, micro_batch=3, in_dims=(0, 0, None))(q, labels, keys).mean().backward()
    ours, q.grad, keys.grad = [q.grad, keys.grad], None, None
    row_loss(q, labels, keys).mean().backward()
    agree(ours, [q.grad, keys.grad])


def test_nested_outputs_other_dimensions_and_keywords():
    def f(x, *, y, scale):
        return {"sum": (x * scale + y).sum(0), "both": (x.T, y.round().long())}

    x, y = torch.randn(3, N, dtype=F64, requires_grad=True), torch.randn(N, dtype=F64)
    got, right = bb.chunked(f, micro_batch=4, in_dims=1)(x, y=y, scale=2.0), f(x, y=y, scale=2.0)
    assert torch.equal(got["sum"], right["sum"])
    assert torch.equal(got["both"][0], right["both"][0])
    assert torch.equal(got["both"][1], right["both"][1])
    assert not got["both"][1].requires_grad
    (got["sum"].square().sum() + got["both"][0].exp().sum()).backward()
    ours, x.grad = x.grad, None
    (right["sum"].square().sum() + right["both"][0].exp().sum()).backward()
    agree([ours], [x.grad])


def test_without_gradients_and_frozen():
    model, x = Encoder(), torch.randn(N, 5, dtype=F64)
    with torch.no_grad():
        out = bb.chunked(model, micro_batch=4)(x)
    assert not out.requires_grad
    assert torch.equal(out, torch.cat([model(part) for part in x.split(4)]))
    model.a.requires_grad_(False)
    bb.chunked(model, micro_batch=4)(x).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None


def test_twice_in_one_graph_and_nested(towers):
    a, _, scale, x, _ = towers

    def loss(f):
        first = f(x)
        return info_nce(first, f(F.pad(first, (0, 2)).sin()), scale)

    given = [*a.parameters(), x, scale]
    right = torch.autograd.grad(loss(a), given)
    ours = bb.chunked(a, micro_batch=4)
    agree(torch.autograd.grad(loss(ours), given), right)
    agree(torch.autograd.grad(loss(bb.chunked(lambda v: ours(v), micro_batch=6)), given), right)


def test_hooks_on_parameters_see_the_whole_gradient(towers):
    a, _, _, x, _ = towers
    seen = []
    a.a.weight.register_hook(lambda g: seen.append(g.clone()))
    a.a.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    bb.chunked(a, micro_batch=4)(x).square().sum().backward()
    a.a.weight._backward_hooks.clear()
    assert len(seen) == 2
    ours, a.a.weight.grad = a.a.weight.grad, None
    a(x).square().sum().backward()
    agree([*seen[:2], ours], [a.a.weight.grad] * 3)


@pytest.mark.parametrize("fused", [True, False])
def test_a_chunked_batch_is_one_micro_batch_of_a_window(fused, towers):
    a, b, scale, x, y = towers
    given = [*a.parameters(), *b.parameters(), scale]
    plain = copy.deepcopy((a, b, scale))
    acc = bb.Accumulator(torch.optim.SGD(given, lr=0.5), every=2, fused=fused)
    f, g = (bb.chunked(model, micro_batch=4) for model in (a, b))
    for k, n in ((0, 1), (1, 3)):
        acc.backward(info_nce(f(x.detach() + k), g(y), scale), items=n)
    pa, pb, ps = plain
    loss = sum(n * info_nce(pa(x.detach() + k), pb(y), ps) for k, n in ((0, 1), (1, 3))) / 4
    loss.backward()
    right = [p - 0.5 * p.grad for p in (*pa.parameters(), *pb.parameters(), ps)]
    agree([p.detach() for p in given], [p.detach() for p in right])


def test_memory_is_that_of_one_piece():
    from bigbatch.engines.torch_memory import PeakMemory

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1024), nn.GELU(), nn.Linear(1024, 16))

    def peak(f, x):
        with PeakMemory() as memory:
            f(x).square().mean().backward()
        return memory.peak

    x = torch.randn(16_384, 16)
    assert peak(bb.chunked(model, micro_batch=128), x) <= 0.02 * peak(model, x) + 2 * x.nbytes


def test_what_was_written_to_since_the_forward_is_refused(towers):
    a, _, _, x, _ = towers
    out = bb.chunked(a, micro_batch=4)(x)
    with torch.no_grad():
        a.a.weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written to between its forward and its backward"):
        out.sum().backward()


def test_it_cannot_be_differentiated_twice(towers):
    a, _, _, x, _ = towers
    (g,) = torch.autograd.grad(bb.chunked(a, micro_batch=4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(g.square().sum(), x)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x: bb.chunked(3, micro_batch=2), TypeError, "function must be a module or a function."),
        (lambda m, x: bb.chunked(m, micro_batch=0), ValueError, "micro_batch must be at least 1."),
        (lambda m, x: bb.chunked(m, micro_batch=2, keep=-1), ValueError, "keep must be a number of pieces"),
        (lambda m, x: bb.chunked(m, micro_batch=2, dtype="float32"), TypeError, "dtype"),
        (lambda m, x: bb.chunked(m, micro_batch=2, in_dims=(0, 0))(x), ValueError, "in_dims must be an integer"),
        (lambda m, x: bb.chunked(lambda x: x.sum(), micro_batch=2)(x), ValueError, "An output must have one entry"),
        (lambda m, x: bb.chunked(lambda x, y: x, micro_batch=2)(x, x[:4]), ValueError, "args[0] of length 11, args[1]"),
        (lambda m, x: bb.chunked(lambda x: x * w, micro_batch=2)(x), ValueError, "a leaf of shape (5,)"),
        (lambda m, x: bb.chunked(lambda x: x * (2 * w), micro_batch=2)(x), ValueError, "a leaf of shape (5,)"),
        (lambda m, x: bb.chunked(lambda x, c=2 * w: x * c, micro_batch=2)(x), ValueError, "a result of MulBackward0"),
        (lambda m, x: bb.chunked(lambda x, alias=m.a.weight: m(x) + alias.sum(), micro_batch=2)(x), ValueError,
         "a leaf of shape (64, 5)"),
        (lambda m, x: bb.chunked(lambda x: v, micro_batch=2)(x), ValueError, "a leaf of shape (2,)"),
        (lambda m, x: bb.chunked(lambda x: x.item, micro_batch=2)(x), TypeError, "must return real tensors"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text, towers):
    with pytest.raises(error) as raised:
        call(towers[0], towers[3].detach())
    assert text in str(raised.value)


w, v = (torch.ones(n, dtype=F64, requires_grad=True) for n in (5, 2))


class Watched(nn.Module):
    """An encoder that remembers how many examples it is called with, and runs out of memory where `fails` says so."""

    def __init__(self, drop=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.calls, self.fails = Encoder(drop, norm), [], lambda examples: False

    def forward(self, x):
        self.calls.append(len(x))
        if self.fails(len(x)):
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        return self.inner(x)


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""
    file = importlib.import_module("bigbatch.torch.chunked_memory")

    def set_free(count):
        monkeypatch.setattr(file, "device_memory", lambda device: Memory(0, count, "the test"))

    return set_free


def trained(model, x, change, seed=3):
    """Outputs, gradients and buffers, and what is drawn afterwards."""
    torch.manual_seed(seed)
    out = change(model)(x)
    out.square().sum().backward()
    found = [out.detach(), *(p.grad.clone() for p in model.parameters()), *model.buffers(), torch.rand(2)]
    model.zero_grad()
    return [found[0], *(t.double().clone() for t in found[1:])]


def test_auto_takes_the_largest_that_fits_plans_once_and_says_so(free, caplog):
    model, x = Encoder(), torch.randn(200, 5, dtype=F64)
    right = trained(model, x, lambda m: m)
    free(200_000)
    ours = bb.chunked(model, micro_batch="auto")
    with caplog.at_level(logging.WARNING, "bigbatch.torch"):
        agree(trained(model, x, lambda m: ours), right)
        agree(trained(model, x, lambda m: ours), right)
    assert len(caplog.messages) == 1
    assert "of a batch of 200" in caplog.text
    assert "predicted from fake tensors" in caplog.text
    assert "micro_batch 200" not in caplog.text
    free(1)
    with pytest.raises(MemoryError, match="No micro-batch fits"):
        bb.chunked(model, micro_batch="auto")(x)
    free(200_000)
    with torch.no_grad():
        assert not bb.chunked(model, micro_batch="auto")(x).requires_grad
    with pytest.raises(ValueError, match="An output must have one entry an example"):
        bb.chunked(lambda x: model(x).sum(), micro_batch="auto")(x)


def test_out_of_memory_in_the_first_run_is_halved_and_done_again(free, caplog):
    x, right_model = torch.randn(24, 5, dtype=F64), Watched(0.5, True)
    right = trained(right_model, x, lambda m: bb.chunked(m, micro_batch=6))
    free(10_000_000)
    model = Watched(0.5, True)
    ours = bb.chunked(model, micro_batch="auto")
    # The first call is the plan's; pieces of 12 fail in their second one, when there have been draws and averages.
    model.fails = lambda examples: len(model.calls) > 1 and examples in (24, 12) and model.calls.count(12) in (0, 2)
    with caplog.at_level(logging.WARNING, "bigbatch.torch"):
        for a, b in zip(trained(model, x, lambda m: ours), right, strict=True):
            assert torch.equal(a, b), "as if the smaller pieces had been the first"
    assert "out of memory at 12; the window is run again with 6." in caplog.text


def test_out_of_memory_in_the_second_run_halves_the_pieces(free, caplog):
    free(10_000_000)
    x, model = torch.randn(24, 5, dtype=F64), Watched()
    ours = bb.chunked(model, micro_batch="auto")
    right = trained(model, x, lambda m: ours)
    out = ours(x)
    model.calls.clear()
    model.fails = lambda examples: examples > 6 or len(model.calls) == 5
    with caplog.at_level(logging.WARNING, "bigbatch.torch"):
        out.square().sum().backward()
    agree([out.detach(), *(p.grad for p in model.parameters())], right[: 1 + len(list(model.parameters()))])
    assert model.calls == [24, 12, 6, 6, 6, *[3] * 8], "from the beginning, so that nothing counts twice"
    assert "out of memory at 12 in the backward, which is run again with 6." in caplog.text
    model.calls, model.fails = [], lambda examples: False
    ours(x)
    assert model.calls == [3] * 8, "and later calls begin with the smaller pieces"


@pytest.mark.parametrize(("drop", "norm"), [(0.5, False), (0.0, True)])
def test_out_of_memory_in_a_second_run_that_draws_or_averages(drop, norm, free):
    """It runs again as it was cut: a smaller piece would draw, or average, something else."""
    free(10_000_000)
    x, model = torch.randn(24, 5, dtype=F64), Watched(drop, norm)
    ours = bb.chunked(model, micro_batch="auto")
    right = trained(model, x, lambda m: ours)
    torch.manual_seed(3)
    out = ours(x)
    model.calls.clear()
    model.fails = lambda examples: len(model.calls) == 1
    out.square().sum().backward()
    for p, grad in zip(model.parameters(), right[1:], strict=False):
        assert torch.equal(p.grad, grad)
    assert model.calls == [24, 24]
    model.zero_grad()
    out = ours(x)
    model.fails = lambda examples: True
    with pytest.raises(torch.OutOfMemoryError):
        out.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_keep_auto_keeps_what_fits(free):
    """With more memory fewer pieces run again; a lack of it all the same costs time and nothing else."""
    x, model = torch.randn(48, 5, dtype=F64), Watched()
    right, runs = trained(model, x, lambda m: m), []
    for count in (1_000, 50_000, 65_000, 10_000_000):
        free(count)
        ours = bb.chunked(model, micro_batch=4, keep="auto")
        agree(trained(model, x, lambda m, ours=ours: ours), right)
        model.calls.clear()
        agree(trained(model, x, lambda m, ours=ours: ours), right)
        runs.append(len(model.calls))
    assert runs[0] == 24
    assert runs[0] > runs[1] > runs[2] > runs[3] == 12
    model.calls.clear()
    model.fails = lambda examples: len(model.calls) == 7
    agree(trained(model, x, lambda m: ours), right)
    assert len(model.calls) == 12 + 1 + 12, "the kept pieces were dropped, and all ran again"
    model.fails = lambda examples: False
    assert bb.chunked(model, micro_batch=4, keep="auto")(x.requires_grad_()).requires_grad


def test_what_keep_auto_counts_is_what_a_piece_keeps():
    from bigbatch.engines.torch_memory import PeakMemory
    from bigbatch.torch.chunked_memory import KeptBytes

    x, model = torch.randn(48, 5, dtype=F64), Encoder(0.5)
    counted = KeptBytes([x, *model.parameters()])
    with PeakMemory() as memory:
        out = model(x)
    with counted.counting():
        model(x)
    assert counted.total == pytest.approx(memory.live - out.nbytes, rel=0.05)


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_buffers_that_are_read_are_those_of_the_piece(how):
    """A centre that follows the outputs, as DINO has it: each piece sees another one, in both runs."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(5, 3, dtype=F64)
            self.register_buffer("centre", torch.zeros(3, dtype=F64))

        def forward(self, x):
            y = torch.tanh(self.inner(x) - self.centre)
            moved = 0.5 * self.centre + y.detach().mean(0)
            if how == "in place":
                self.centre.copy_(moved)
            else:
                self.centre = moved
            return y

    x, ours, plain = torch.randn(N, 5, dtype=F64), Centred(), Centred()
    bb.chunked(ours, micro_batch=4)(x).square().sum().backward()
    outputs = []
    for part in x.split(4):
        plain.centre = plain.centre.clone()  # autograd refuses the plain loop that writes in place
        outputs.append(plain(part))
    torch.cat(outputs).square().sum().backward()
    agree([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])
    assert torch.equal(ours.centre, plain.centre)


def test_a_piece_that_does_not_repeat_itself_is_found_by_audit():
    model, x = Encoder(0.5), torch.randn(N, 5, dtype=F64)

    def loss_fn(noise):
        encode = bb.chunked(lambda x: model(x * (1 + noise())), micro_batch=2)
        return lambda x: encode(x).square().mean()

    draw = np.random.default_rng(0)
    with pytest.raises(RuntimeError, match=r"must repeat itself.*Received: output of examples \d+ to \d+ differs by"):
        bb.audit(loss_fn(lambda: 0.1 * draw.random()), model, x, micro_batch=4)
    bb.audit(loss_fn(lambda: 0.1 * torch.rand(())), model, x, micro_batch=4)
    loss_fn(lambda: 0.1 * draw.random())(x).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4096_examples_within_the_bound_of_their_rounding(dtype):
    """Against float64 on the same weights and inputs, for a loss of the mean output over the batch.

    An example adds x · (1 - tanh²) · g to the gradient, and each of the factors and products is rounded: the product
    with the weights, tanh, its square, the difference, g, two products, the piece's sum, and the whole sum at the end.
    With |tanh| < 1/2 that is less than 12 roundings of the sum of absolute values. Sums over the pieces do not count,
    for they are in float32; in 16 bits they would be far outside.
    """
    rounding = torch.finfo(dtype).eps / 2
    torch.manual_seed(0)
    w = torch.rand(8, 4, dtype=F64).div(32).to(dtype)
    x = torch.rand(4096, 8, dtype=F64).to(dtype)

    def gradient(dtype, change):
        v = w.to(dtype).requires_grad_()
        y = change(lambda x, v: torch.tanh(x @ v))(x.to(dtype), v)
        y.double().mean(0).square().sum().backward()
        return v.grad.double()

    right = gradient(F64, lambda f: f)  # all that it adds up is positive, so it is the sum of absolute values
    options = {"micro_batch": 16, "in_dims": (0, None)}
    ours = gradient(dtype, lambda f: bb.chunked(f, **options))
    assert ((ours - right).abs() <= 12 * rounding * right).all()
    if dtype == torch.bfloat16:
        narrow = gradient(dtype, lambda f: bb.chunked(f, dtype=None, **options))
        assert ((narrow - right).abs() > 12 * rounding * right).any()
