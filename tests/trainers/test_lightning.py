"""`bigbatch.lightning.Accumulate` in Lightning's own loop, against training on the true batches."""

import functools
import inspect
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from bigbatch.lightning import Accumulate
from conformance.ranks_pool import pool
from trainers import tiny

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
# Lightning 2.6 reads plain tensors only unless it is told to read the rest; before that nothing could be said.
WHOLE = {"weights_only": False} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data"),
]


class Module(pl.LightningModule):
    """As in Lightning's documentation."""

    def __init__(self, optimizer=tiny.sgd, schedule=False, dtype=torch.float64):
        super().__init__()
        self.model, self.optimizer, self.schedule = tiny.Model(dtype), optimizer, schedule

    def training_step(self, batch, batch_idx):
        return tiny.loss_of(self.model, batch)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.model)
        if not self.schedule:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": tiny.decay(optimizer), "interval": "step"}}


class Updates(pl.Callback):
    """Keeps what each window came to."""

    def __init__(self, accumulate):
        self.accumulate, self.seen = accumulate, []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(self.accumulate.update)


def loader(tokens):
    return torch.utils.data.DataLoader(tokens, batch_size=4)


def fitted(tokens, module, epochs=2, callbacks=(), items=tiny.items, every=4, **options):
    accumulate = Accumulate(items)
    updates = Updates(accumulate)
    trainer = pl.Trainer(
        max_epochs=epochs, accumulate_grad_batches=every, callbacks=[accumulate, updates, *callbacks],
        **{**QUIET, **options},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*(returned `None`|num_workers|many workers|log_every_n_steps|LeafSpec|checkpoint)"
        )
        trainer.fit(module, loader(tokens), ckpt_path=options.get("ckpt_path"))
    return tiny.flat(module.model), updates.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", tiny.CASES)
def test_the_weights_are_the_true_batches(case, dtype):
    given = dict(tiny.CASES[case])
    tokens = tiny.texts(given.pop("count", 21), given.pop("ragged", True))
    wanted, seen = tiny.trained(tiny.windows_of(tokens.split(4)) * 2, dtype=dtype, **given)
    clip = given.pop("clip", None)
    weights, updates = fitted(tokens, Module(dtype=dtype, **given), gradient_clip_val=clip)
    assert tiny.distance(weights, wanted) <= tiny.BOUND[dtype]
    relative = tiny.BOUND[dtype] * 10
    for update, (loss, norm) in zip(updates, seen, strict=True):
        assert (update.loss, update.grad_norm) == (pytest.approx(loss, rel=relative), pytest.approx(norm, rel=relative))


def test_lightnings_own_accumulation_is_off():
    """Otherwise these cases could not tell."""
    tokens = tiny.texts()
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(max_epochs=1, accumulate_grad_batches=4, **QUIET).fit(module, loader(tokens))
    wanted, _ = tiny.trained(tiny.windows_of(tokens.split(4)))
    assert tiny.distance(tiny.flat(module.model), wanted) > 1e-3


class Squares(Module):
    def training_step(self, batch, batch_idx):
        return {"loss": self.model(batch).square().mean(), "seen": batch_idx}


def test_without_items_the_leading_dimension_counts():
    tokens = tiny.texts(21, ragged=False)
    module, whole = Squares(), Squares()
    weights, _ = fitted(tokens, module, 1, items=None)
    step = tiny.sgd(whole.model)
    for window in tiny.windows_of(tokens.split(4)):
        whole.model(window).square().mean().backward()
        step.step()
        step.zero_grad()
    assert tiny.distance(weights, tiny.flat(whole.model)) <= 1e-12


def test_the_number_may_change_between_epochs():
    tokens = tiny.texts(24)
    weights, _ = fitted(tokens, Module(), every=1, callbacks=[GradientAccumulationScheduler({0: 2, 1: 3})])
    parts = tokens.split(4)
    wanted, _ = tiny.trained(tiny.windows_of(parts, 2) + tiny.windows_of(parts, 3))
    assert tiny.distance(weights, wanted) <= 1e-12


class Skipping(Module):
    """A training_step that returns None for some batches is left out."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (1, 3) else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["64-true", "scaler"])
def test_a_micro_batch_may_be_left_out(precision):
    tokens = tiny.texts()
    options = {"plugins": [scaled()]} if precision == "scaler" else {}
    dtype = torch.float32 if precision == "scaler" else torch.float64
    weights, _ = fitted(tokens, Skipping(dtype=dtype), 1, **options)
    parts = tokens.split(4)
    wanted, _ = tiny.trained([torch.cat([parts[0], parts[2]]), torch.cat(parts[4:])], dtype=dtype)
    assert tiny.distance(weights, wanted) <= tiny.BOUND[dtype]


class Scaled(MixedPrecision):
    """16-mixed without the autocast, so that the sums can be compared to the last bits."""

    def forward_context(self):
        return torch.autograd.set_grad_enabled(True)


def scaled():
    return Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


class Overflowing(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.current_epoch == 1 and batch_idx == 2 else loss


def test_under_16_mixed_the_mean_is_unscaled_once_and_an_overflow_is_skipped():
    tokens = tiny.texts(16)
    module = Overflowing(dtype=torch.float32)
    weights, updates = fitted(tokens, module, 3, plugins=[scaled()], gradient_clip_val=0.1)
    wanted, seen = tiny.trained([tokens] * 2, dtype=torch.float32, clip=0.1)
    assert tiny.distance(weights, wanted) <= 1e-6
    assert not updates[1].loss < float("inf")
    assert updates[0].grad_norm == pytest.approx(seen[0][1], rel=1e-5)


def test_bf16_mixed_stays_as_near_the_true_batch_as_its_forwards_are():
    tokens = tiny.texts()
    weights, _ = fitted(tokens, Module(dtype=torch.float32), 1, precision="bf16-mixed")
    wanted, _ = tiny.trained(tiny.windows_of(tokens.split(4)), dtype=torch.float32)
    assert tiny.distance(weights, wanted) <= 2e-3


def test_bf16_true_adds_up_in_float32():
    tokens = tiny.texts()
    weights, _ = fitted(tokens, Module(dtype=torch.bfloat16), 1, precision="bf16-true")
    wanted, _ = tiny.trained(tiny.windows_of(tokens.split(4)), dtype=torch.float32)
    assert tiny.distance(weights.float(), wanted) <= 1e-2


@pytest.mark.parametrize("where", ["between windows", "inside a window"])
def test_a_checkpoint_goes_on_bit_for_bit(where, tmp_path):
    tokens = tiny.texts(32)
    steps = {"between windows": 4, "inside a window": 6}[where]

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx + 1 == steps:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    straight, _ = fitted(tokens, Module(tiny.adamw, schedule=True), 1, [Saving()])
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)
    assert ("Accumulate" in saved["callbacks"]) is (where == "inside a window")
    resumed = Module(tiny.adamw, schedule=True)
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=4, callbacks=[Accumulate(tiny.items)], **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Lightning counts on from there, and has the loader begin anew.
        rest = loader(torch.cat([tokens[4 * steps :], tokens[: 4 * steps]]))
        trainer.fit(resumed, rest, ckpt_path=tmp_path / "saved.ckpt", **WHOLE)
    assert torch.equal(tiny.flat(resumed.model), straight)


def test_lightnings_own_resuming_after_an_epoch_is_bit_for_bit(tmp_path):
    tokens = tiny.texts()
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    straight, _ = fitted(
        tokens, Module(tiny.adamw, True), 2, [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], **options
    )
    resumed = Module(tiny.adamw, True)
    trainer = pl.Trainer(max_epochs=2, accumulate_grad_batches=4, callbacks=[Accumulate(tiny.items)], **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(resumed, loader(tokens), ckpt_path=tmp_path / "epoch=0.ckpt", **WHOLE)
    assert torch.equal(tiny.flat(resumed.model), straight)


class Breaking(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise OSError("broken")


class Stopping(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 1


@pytest.mark.parametrize("callback", [Breaking, Stopping])
def test_training_that_ends_inside_a_window_leaves_the_next_one_exact(callback):
    tokens = tiny.texts()
    module = Module()
    start = tiny.flat(module.model)
    accumulate = Accumulate(tiny.items)
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=4, callbacks=[accumulate, callback()], **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if callback is Breaking:
            with pytest.raises(OSError, match="broken"):
                trainer.fit(module, loader(tokens))
        else:
            warnings.filterwarnings("error", "Training ended inside a window")
            with pytest.raises(UserWarning, match="its 2 micro-batches made no update"):
                trainer.fit(module, loader(tokens))
    assert torch.equal(tiny.flat(module.model), start)
    assert all(p.grad is None for p in module.parameters())
    weights, _ = fitted(tokens, module, 1)
    assert tiny.distance(weights, tiny.trained(tiny.windows_of(tokens.split(4)))[0]) <= 1e-12


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("loss", tiny.loss_of(self.model, batch))


def test_a_validation_inside_a_window_changes_nothing():
    tokens = tiny.texts()
    module = Validated()
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=4, val_check_interval=3, callbacks=[Accumulate(tiny.items)], **QUIET
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(tokens), loader(tokens))
    assert tiny.distance(tiny.flat(module.model), tiny.trained(tiny.windows_of(tokens.split(4)))[0]) <= 1e-12


def test_max_steps_ends_between_windows():
    tokens = tiny.texts(32)
    weights, _ = fitted(tokens, Module(), -1, max_steps=1)
    assert tiny.distance(weights, tiny.trained([tokens[:16]])[0]) <= 1e-12


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Backward(Module):
    def backward(self, loss):
        loss.backward()


class Two(Module):
    def configure_optimizers(self):
        return [tiny.sgd(self.model), tiny.sgd(tiny.Model())]


@pytest.mark.parametrize(
    ("module", "said"),
    [(Manual, "is for automatic optimization"), (Backward, "a backward of its own"), (Two, "multiple optimizers")],
)
def test_what_it_is_not_for_is_refused(module, said):
    """Several optimizers by Lightning itself, as are two of these callbacks."""
    made = module()
    with pytest.raises((ValueError, RuntimeError), match=said):
        fitted(tiny.texts(), made, 1, every=1)
    assert torch.equal(tiny.flat(made.model), tiny.flat(tiny.Model()))
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fitted(tiny.texts(), Module(), 1, [Accumulate(tiny.items)])


@pytest.mark.parametrize("items", [lambda batch: 0, lambda batch: -1.0, lambda batch: "4"])
def test_items_that_are_no_count_are_refused_and_the_model_is_untouched(items):
    module = Module()
    with pytest.raises((TypeError, ValueError), match="items must be"):
        fitted(tiny.texts(), module, 1, items=items)
    assert torch.equal(tiny.flat(module.model), tiny.flat(tiny.Model()))


def test_items_that_are_no_function_are_refused():
    with pytest.raises(TypeError, match="must be a function of the batch"):
        Accumulate(items=4)


def in_torchrun():
    """Its environment, so that Lightning starts no processes of its own."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29556", TORCHELASTIC_RUN_ID="1", GROUP_RANK="0", LOCAL_WORLD_SIZE="2"
    )


def _import_lightning():
    """For a rank, which has imported this file to find the function."""


@functools.cache
def ranks():
    """Two that have imported Lightning already: on a busy machine that takes longer than a rank is waited for."""
    made = pool(2)
    for pipe in made.pipes:
        pipe.send((_import_lightning, ()))
    for pipe in made.pipes:
        assert pipe.poll(300)
        assert pipe.recv() is None
    return made


def in_a_rank(count, optimizer, clip):
    in_torchrun()
    rank = int(os.environ["RANK"])
    tokens = torch.cat(tiny.texts(count).split(4)[rank::2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "gradient_clip_val": clip}
        return fitted(tokens, Module(optimizer), 1, **options)


@pytest.mark.parametrize(("optimizer", "clip"), [(tiny.sgd, None), (tiny.adamw, 0.1)])
def test_two_processes(optimizer, clip):
    """46 examples: twelve micro-batches, the last with two; a process's windows hold four, then two."""
    results = ranks().run(in_a_rank, 46, optimizer, clip)
    parts = tiny.texts(46).split(4)
    a, b = parts[::2], parts[1::2]
    wanted, seen = tiny.trained([torch.cat([*a[:4], *b[:4]]), torch.cat([*a[4:], *b[4:]])], optimizer, clip)
    for weights, updates in results:
        assert tiny.distance(weights, wanted) <= 1e-12
        assert [u.loss for u in updates] == pytest.approx([loss for loss, _ in seen], rel=1e-12)


class Sharded(Module):
    def configure_model(self):
        if not hasattr(self, "sharded"):
            self.sharded = True
            for layer in (self.model.net[1], self.model.net[3], self.model):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return self.optimizer(self.model)


def in_a_sharded_rank(count):
    in_torchrun()
    tokens = torch.cat(tiny.texts(count).split(4)[int(os.environ["RANK"]) :: 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        return fitted(tokens, Sharded(), 1, strategy=strategy, devices=2, use_distributed_sampler=False)


def test_two_processes_with_fully_shard():
    parts = tiny.texts(46).split(4)
    a, b = parts[::2], parts[1::2]
    wanted, _ = tiny.trained([torch.cat([*a[:4], *b[:4]]), torch.cat([*a[4:], *b[4:]])])
    for weights, updates in ranks().run(in_a_sharded_rank, 46):
        assert tiny.distance(weights, wanted) <= 1e-12
        assert len(updates) == 2
