"""`bigbatch.accelerate` in the loop of Accelerate's own documentation, against training on the true batches."""

import os
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType

import bigbatch.accelerate as bb
from bigbatch.torch.checks import check_optimizer
from conformance.ranks_pool import pool
from trainers import tiny


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate keeps one state a process, and tests many."""
    forget()
    yield
    forget()


def forget():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def prepared(tokens, optimizer=tiny.sgd, schedule=False, dtype=torch.float64, every=4, even_batches=True):
    configuration = DataLoaderConfiguration(even_batches=even_batches)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every, dataloader_config=configuration)
    model = tiny.Model(dtype)
    step = optimizer(model)
    scheduler = tiny.decay(step) if schedule else torch.optim.lr_scheduler.ConstantLR(step, 1.0, 1)
    loader = torch.utils.data.DataLoader(tokens, batch_size=4)
    return accelerator, *accelerator.prepare(model, step, scheduler, loader)


def epoch(accelerator, model, optimizer, scheduler, loader, clip=None):
    """The loop of Accelerate's documentation, with its backward replaced."""
    reports = []
    for tokens in loader:
        with accelerator.accumulate(model):
            loss = tiny.loss_of(model, tokens)
            reports.append(bb.backward(accelerator, loss, items=tiny.items(tokens)))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", tiny.CASES)
def test_the_weights_are_the_true_batches(case, dtype):
    given = dict(tiny.CASES[case])
    tokens = tiny.texts(given.pop("count", 21), given.pop("ragged", True))
    clip = given.get("clip")
    wanted, seen = tiny.trained(tiny.windows_of(tokens.split(4)) * 2, dtype=dtype, **given)
    given.pop("clip", None)
    parts = prepared(tokens, dtype=dtype, **given)
    reports = [report for _ in range(2) for report in epoch(*parts, clip=clip)]
    assert tiny.distance(tiny.flat(parts[1]), wanted) <= tiny.BOUND[dtype]
    updates = [report for report in reports if report]
    relative = tiny.BOUND[dtype] * 10
    for update, (loss, norm) in zip(updates, seen, strict=True):
        assert (update.loss, update.grad_norm) == (pytest.approx(loss, rel=relative), pytest.approx(norm, rel=relative))


def test_the_stock_backward_is_off():
    """Otherwise these cases could not tell."""
    tokens = tiny.texts()
    wanted, _ = tiny.trained(tiny.windows_of(tokens.split(4)))
    accelerator, model, optimizer, _, loader = prepared(tokens)
    for part in loader:
        with accelerator.accumulate(model):
            accelerator.backward(tiny.loss_of(model, part))
            optimizer.step()
            optimizer.zero_grad()
    assert tiny.distance(tiny.flat(model), wanted) > 1e-3


def test_a_checkpoint_between_windows_goes_on_bit_for_bit(tmp_path):
    tokens = tiny.texts()
    straight = prepared(tokens, tiny.adamw, schedule=True)
    epoch(*straight)
    straight[0].save_state(tmp_path)
    epoch(*straight)
    forget()
    resumed = prepared(tokens, tiny.adamw, schedule=True)
    resumed[0].load_state(tmp_path)
    epoch(*resumed)
    assert torch.equal(tiny.flat(resumed[1]), tiny.flat(straight[1]))


def test_under_fp16_the_mean_is_unscaled_once_and_an_overflow_is_skipped(monkeypatch):
    """Accelerate refuses fp16 without a GPU, so its parts are put together here."""
    tokens = tiny.texts(16)
    wanted, _ = tiny.trained(tiny.windows_of(tokens.split(4)) * 2, dtype=torch.float32, clip=0.1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = tiny.Model(torch.float32)
    model, optimizer = accelerator.prepare(model, tiny.sgd(model))
    accelerator.native_amp = True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")  # from here on, so that no forward is rounded
    for broken in (False, True, False):
        for k, part in enumerate(tokens.split(4)):
            with accelerator.accumulate(model):
                loss = tiny.loss_of(model, part) * (float("inf") if broken and k == 2 else 1)
                bb.backward(accelerator, loss, items=tiny.items(part))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        assert optimizer.step_was_skipped is broken
    assert tiny.distance(tiny.flat(model), wanted) <= 1e-6


@pytest.mark.parametrize("act", ["accelerator.backward", "clip", "an exception", "evaluation"])
def test_what_happens_inside_a_window(act):
    tokens = tiny.texts(16)
    accelerator, model, optimizer, *_ = prepared(tokens)
    parts = tokens.split(4)
    start = tiny.flat(model)

    def micro_batch(part):
        with accelerator.accumulate(model):
            bb.backward(accelerator, tiny.loss_of(model, part), items=tiny.items(part))
            optimizer.step()
            optimizer.zero_grad()

    def window():
        for part in parts:
            micro_batch(part)

    micro_batch(parts[0])
    if act == "an exception":
        with pytest.raises(OSError, match="broken"), accelerator.accumulate(model):
            raise OSError("broken")
    elif act == "evaluation":
        model.eval()
        with torch.no_grad():
            tiny.loss_of(model, parts[3])
        model.train()
    else:
        if act == "clip":
            accelerator.clip_grad_norm_(model.parameters(), 1e-3)
        else:
            accelerator.backward(tiny.loss_of(model, parts[1]))
        with pytest.raises(RuntimeError, match="open window"):
            micro_batch(parts[1])
        assert torch.equal(tiny.flat(model), start)
        accelerator.step = 0
        window()
        assert tiny.distance(tiny.flat(model), tiny.trained([tokens])[0]) <= 1e-12
        return
    # Accelerate counts the micro-batch that had no backward: three make the window.
    held = [parts[0], parts[1], parts[2]] if act == "an exception" else list(parts)
    for part in held[1:]:
        micro_batch(part)
    assert tiny.distance(tiny.flat(model), tiny.trained([torch.cat(held)])[0]) <= 1e-12


def test_two_losses_in_a_micro_batch_are_refused_and_the_next_window_is_exact():
    tokens = tiny.texts(16)
    accelerator, model, optimizer, *_ = prepared(tokens)
    parts = tokens.split(4)
    with accelerator.accumulate(model):
        bb.backward(accelerator, tiny.loss_of(model, parts[0]), items=tiny.items(parts[0]))
        for _ in range(2):
            bb.backward(accelerator, tiny.loss_of(model, parts[0]), items=tiny.items(parts[0]))
        with pytest.raises(RuntimeError, match="has one loss"):
            bb.backward(accelerator, tiny.loss_of(model, parts[0]), items=tiny.items(parts[0]))
    accelerator.step = 3
    with accelerator.accumulate(model):
        bb.backward(accelerator, tiny.loss_of(model, tokens), items=tiny.items(tokens))
        with pytest.raises(RuntimeError, match="has one loss"):
            bb.backward(accelerator, tiny.loss_of(model, tokens), items=tiny.items(tokens))
        optimizer.step()
        optimizer.zero_grad()
    assert tiny.distance(tiny.flat(model), tiny.trained([tokens])[0]) <= 1e-12


def test_another_model_prepared_later_is_another_window():
    tokens = tiny.texts(4)
    accelerator, model, *_ = prepared(tokens, every=1)
    accelerator.free_memory()
    other = tiny.Model()
    other, step = accelerator.prepare(other, tiny.sgd(other))
    with accelerator.accumulate(other):
        bb.backward(accelerator, tiny.loss_of(other, tokens), items=tiny.items(tokens))
        step.step()
    assert tiny.distance(tiny.flat(other), tiny.trained([tokens])[0]) <= 1e-12
    assert torch.equal(tiny.flat(model), tiny.flat(tiny.Model()))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_who_keeps_the_gradients_is_refused(kind, monkeypatch):
    accelerator, model, *_ = prepared(tiny.texts(4))
    monkeypatch.setattr(type(accelerator), "distributed_type", kind)
    with pytest.raises(ValueError, match=r"needs the gradients in \.grad"):
        bb.backward(accelerator, tiny.loss_of(model, tiny.texts(4)), items=1)


def test_arguments_are_refused():
    accelerator = Accelerator(cpu=True)
    model = tiny.Model()
    loss = tiny.loss_of(model, tiny.texts(4))
    with pytest.raises(ValueError, match="has prepared no optimizer"):
        bb.backward(accelerator, loss, items=1)
    with pytest.raises(TypeError, match="must be an Accelerator"):
        bb.backward(loss, accelerator, items=1)
    accelerator.prepare(model, tiny.sgd(model))
    with pytest.raises(ValueError, match="items must be positive"):
        bb.backward(accelerator, loss, items=0)


def test_the_private_names():
    """`_models` and `_optimizers` hold what was prepared, and a wrapped optimizer has its own as `optimizer`."""
    accelerator, model, optimizer, *_ = prepared(tiny.texts(4))
    assert accelerator._models == [model]
    assert accelerator._optimizers == [optimizer]
    check_optimizer(optimizer.optimizer)


def in_a_rank(count, even_batches, optimizer, schedule, clip):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")  # asked for, and not used: there is a group
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = prepared(tiny.texts(count), optimizer, schedule, even_batches=even_batches)
    accelerator, model, step, *_ = parts
    assert accelerator.num_processes == 2
    updates = [update for update in epoch(*parts, clip=clip) if update]
    while update := bb.flush(accelerator):
        step.step()
        step.zero_grad()
        updates.append(update)
    try:
        return tiny.flat(model), [(u.loss, u.items) for u in updates]
    finally:
        accelerator.free_memory()


@pytest.mark.parametrize(("optimizer", "clip"), [(tiny.sgd, None), (tiny.adamw, 0.1)])
def test_two_processes(optimizer, clip):
    """45 examples: twelve micro-batches of 4, the last with one; a process's windows hold four, then two."""
    results = pool(2).run(in_a_rank, 45, False, optimizer, False, clip)
    parts = tiny.texts(45).split(4)
    mine = [parts[rank::2] for rank in range(2)]
    windows = [torch.cat([*a, *b]) for a, b in ((mine[0][:4], mine[1][:4]), (mine[0][4:], mine[1][4:]))]
    wanted, seen = tiny.trained(windows, optimizer, clip)
    for weights, updates in results:
        assert tiny.distance(weights, wanted) <= 1e-12
        assert updates == [
            (pytest.approx(loss, rel=1e-12), int(tiny.items(w))) for (loss, _), w in zip(seen, windows, strict=True)
        ]
