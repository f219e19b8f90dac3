"""`bigbatch.transformers`: what happens to a window: resuming, stopping, errors, refusals, two ranks."""

import os

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

import bigbatch.torch as bb
from bigbatch.transformers import BigBatch, Trainer
from conformance.ranks_pool import pool
from trainers import hf

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own deprecations


@pytest.mark.parametrize("steps", [1, 2])
def test_a_checkpoint_resumes_bit_for_bit(steps):
    args = {"num_train_epochs": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear", "save_strategy": "steps"}
    args |= {"save_steps": steps, "output_dir": hf.options().output_dir}
    whole = hf.trained(Trainer, hf.gpt2(dropout=0.1), hf.texts(), args=args)
    again = Trainer(hf.gpt2(dropout=0.1), hf.options(**args), train_dataset=hf.texts(), data_collator=hf.collate)
    again.train(resume_from_checkpoint=os.path.join(args["output_dir"], f"checkpoint-{steps}"))
    assert again.state.global_step == whole.state.global_step == 4
    assert hf.distance(again.model, whole.model) == 0
    assert hf.logs(again) == hf.logs(whole)


class Stop(TrainerCallback):
    """In the second micro-batch of the first window it does something, once."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def on_substep_end(self, args, state, control, **_):
        self.calls += 1
        if self.calls == 2:
            self.what(control)


def fail(control):
    raise OSError("the disk is full")


def stop(control):
    control.should_training_stop = True


@pytest.mark.parametrize("what", [fail, stop])
def test_the_window_after_a_broken_one_is_exact(what):
    """Training that ends in a window, by an exception or by a callback's wish, leaves nothing of it."""
    data = hf.texts()
    target, seen = hf.true_batches(hf.gpt2(), data)
    trainer = Trainer(hf.gpt2(), hf.options(), train_dataset=data, data_collator=hf.collate, callbacks=[Stop(what)])
    try:
        trainer.train()
    except OSError:
        assert what is fail
    assert hf.distance(trainer.model, hf.gpt2()) == 0
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.train()
    assert hf.distance(trainer.model, target) < 1e-6
    assert torch.allclose(torch.tensor(hf.logs(trainer)), torch.tensor(seen), rtol=1e-4)


def test_an_evaluation_inside_a_window():
    data = hf.texts()
    target, _ = hf.true_batches(hf.gpt2(), data)
    trainer = Trainer(hf.gpt2(), hf.options(), train_dataset=data, eval_dataset=data[:5], data_collator=hf.collate)
    trainer.add_callback(Stop(lambda control: trainer.evaluate()))
    trainer.train()
    assert hf.distance(trainer.model, target) < 1e-6


def test_max_steps_and_a_second_training():
    data = hf.texts()
    target, _ = hf.true_batches(hf.gpt2(), data[:16])
    trainer = hf.trained(Trainer, hf.gpt2(), data, args={"max_steps": 1})
    assert hf.distance(trainer.model, target) < 1e-6
    target, _ = hf.true_batches(target, data[:16])
    trainer.train()
    assert hf.distance(trainer.model, target) < 1e-6


def test_labels_that_are_all_left_out_count_for_nothing():
    data = hf.texts(20)
    for example in data[:4]:  # the whole first micro-batch
        example["labels"] = [-100] * len(example["labels"])
    target, _ = hf.true_batches(hf.gpt2(), data)
    assert hf.distance(hf.trained(Trainer, hf.gpt2(), data).model, target) < 1e-6


def coupled(outputs, labels, num_items_in_batch=None):
    """In-batch negatives: each row against all others."""
    rows = outputs.logits.mean(1)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def random(outputs, labels, num_items_in_batch=None):
    return (outputs.logits * torch.rand_like(outputs.logits)).mean()


def two_terms(outputs, labels, num_items_in_batch=None):
    """A mean over tokens beside a mean over examples."""
    tokens = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return tokens + outputs.logits[:, 0].square().mean()


@pytest.mark.parametrize("function", [coupled, random, two_terms])
@pytest.mark.parametrize("size", [4, 1])
def test_a_loss_that_does_not_tell_its_items(function, size):
    model = hf.llama()
    with pytest.raises(ValueError, match="Pass items="):
        hf.trained(Trainer, model, hf.texts(), size=size, compute_loss_func=function)
    assert hf.distance(model, hf.llama()) == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_routers_loss():
    sizes = {"num_local_experts": 4, "num_key_value_heads": 2, "output_router_logits": True}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=hf.WORDS, hidden_size=16, **hf.SIZES, **sizes))
    with pytest.raises(ValueError, match="output_router_logits"):
        hf.trained(Trainer, model, hf.texts())
    hf.trained(Trainer, model, hf.texts(8), items=hf.predicted)


def test_the_mix_in_stands_first():
    with pytest.raises(TypeError, match="BigBatch must stand before the trainer"):
        type("Wrong", (transformers.Trainer, BigBatch), {})
    type("Right", (BigBatch, transformers.Seq2SeqTrainer), {})


def make(**given):
    args = given.pop("args", {})
    return Trainer(hf.gpt2(), hf.options(**args), train_dataset=hf.texts(), data_collator=hf.collate, **given)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"args": {"fp16": True}}, ValueError, "fp16 without a scaler that unscales"),
        ({"args": {"optim": "lomo"}}, ValueError, "steps in each backward"),
        ({"items": 4}, TypeError, "items must be a function"),
        ({"every": 4}, TypeError, "set gradient_accumulation_steps"),
    ],
)
def test_refusals_when_it_is_made(given, kind, text):
    with pytest.raises(kind, match=text):
        make(**given)


def test_items_that_are_none():
    with pytest.raises(ValueError, match=r"items must be positive\. Received: items=-1"):
        make(items=lambda inputs: -1).train()
    with pytest.raises(TypeError, match="items must be a number"):
        make(items=lambda inputs: "4").train()


@pytest.mark.parametrize("what", ["DeepSpeed", "XLA", "accelerator"])
def test_what_hides_the_gradients_is_refused(what):
    trainer = make()
    if what == "DeepSpeed":
        trainer.is_deepspeed_enabled = True
    elif what == "XLA":
        trainer.accelerator.state.distributed_type = transformers.trainer.DistributedType.XLA
    else:
        trainer.accelerator.gradient_accumulation_steps = 4
    try:
        with pytest.raises(ValueError, match={"XLA": "A TPU"}.get(what, what)):
            trainer.train()
    finally:
        trainer.accelerator.state.distributed_type = transformers.trainer.DistributedType.NO
        trainer.accelerator.gradient_accumulation_steps = 1


def test_an_accumulator_of_the_same_model_is_refused():
    trainer = make()
    model = trainer.model
    outer = bb.Accumulator(torch.optim.SGD(model.parameters(), 0.1), every=4)
    outer.backward(model(**hf.collate(hf.texts(4))).loss, items=4)
    with pytest.raises(RuntimeError, match=r"[Ss]econd window on the same parameters"):
        trainer.train()


def test_training_steps_that_do_not_call_the_backward_once():
    class Twice(Trainer):
        def compute_loss(self, model, inputs, **given):
            loss = super().compute_loss(model, inputs, **given)
            if torch.is_grad_enabled():
                self.accelerator.backward(model(**inputs).loss)
            return loss

    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    for kind, text in ((Twice, "must call accelerator.backward once"), (Own, "steps before its window is complete")):
        model = hf.gpt2()
        with pytest.raises(RuntimeError, match=text):
            hf.trained(kind, model, hf.texts())
        assert hf.distance(model, hf.gpt2()) == 0


def test_a_training_step_around_the_librarys_own():
    class Timed(Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    target, _ = hf.true_batches(hf.gpt2(), hf.texts())
    trainer = hf.trained(Timed, hf.gpt2(), hf.texts())
    assert trainer.steps == 6
    assert hf.distance(trainer.model, target) < 1e-6


@pytest.mark.parametrize("find", [True, False])
@pytest.mark.parametrize("name", hf.ON_RANKS)
def test_two_ranks(name, find):
    """A window holds both ranks' micro-batches: eight of them, then four."""
    make, data = hf.ON_RANKS[name]
    target, seen = hf.true_batches(make(), data(), window=16, clip=0.3)
    results = pool(2).run(hf.train_in_a_rank, name, 2, {"max_grad_norm": 0.3}, find)
    for weights, logged, kinds in results:
        assert kinds == ("DistributedDataParallel", 2)
        model = make()
        for p, w in zip(model.parameters(), weights, strict=True):
            p.data = w
        assert hf.distance(model, target) < 1e-6
        assert torch.allclose(torch.tensor(logged), torch.tensor(seen), rtol=1e-4)
