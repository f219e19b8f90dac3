"""`bigbatch.transformers.Trainer` against training on the true batches: models, losses, options of the trainer."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.optim import SGD, AdamW
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.trainer_pt_utils import LabelSmoother

from bigbatch.transformers import Trainer
from trainers import hf

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own deprecations


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=hf.WORDS, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )


def one_class(i):
    return i % 3


MODELS = {
    "Llama": (hf.llama, hf.texts()),
    "Llama, prompts left out": (hf.llama, hf.texts(prompt=2)),
    "Llama, equal windows": (hf.llama, hf.texts(32, ragged=False)),
    "GPT-2": (hf.gpt2, hf.texts()),
    "classes": (lambda: hf.bert(num_labels=3), hf.labelled(one_class)),
    "classes, some left out": (lambda: hf.bert(num_labels=3), hf.labelled(lambda i: i % 3 if i % 5 else -100)),
    "several labels an example": (lambda: hf.bert(num_labels=3), hf.labelled(lambda i: [1.0, i % 2, 0.0])),
    "regression": (lambda: hf.bert(num_labels=1), hf.labelled(lambda i: i / 3)),
    "a class for each token": (lambda: hf.bert(BertForTokenClassification, num_labels=hf.WORDS), hf.texts(prompt=1)),
    "masked tokens": (lambda: hf.bert(BertForMaskedLM), hf.texts(prompt=2)),
    "encoder and decoder": (t5, hf.texts()),
}


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("case", MODELS)
def test_the_weights_are_the_true_batches(case, size):
    """Of ragged micro-batches, and of single examples, whose own loss does not show what it is the mean of."""
    make, data = MODELS[case]
    target, seen = hf.true_batches(make(), data)
    trainer = hf.trained(Trainer, make(), data, size=size, every=16 // size)
    assert hf.distance(trainer.model, target) < 1e-6
    assert torch.allclose(torch.tensor(hf.logs(trainer)), torch.tensor(seen), rtol=1e-4)


@pytest.mark.parametrize("case", ["classes", "regression", "several labels an example"])
def test_in_float64_where_the_loss_is_computed_in_it(case):
    make, data = MODELS[case]
    double = [{**example, "labels": example["labels"]} for example in data]
    cast = (lambda batch: {**batch, "labels": batch["labels"].double()}) if case != "classes" else (lambda batch: batch)
    target, _ = hf.true_batches(make().double(), double, loss_of=lambda model, batch: model(**cast(batch)).loss)
    args = hf.options()
    trainer = Trainer(make().double(), args, train_dataset=double, data_collator=lambda rows: cast(hf.collate(rows)))
    trainer.train()
    assert hf.distance(trainer.model, target) < 1e-12


def mean(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def divided(outputs, labels, num_items_in_batch):
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def mean_of_rows(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def of(function):
    def loss_of(model, batch):
        labels = batch["labels"]
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return function(outputs, labels, num_items_in_batch=(labels[:, 1:] != -100).sum())

    return loss_of


@pytest.mark.parametrize("function", [mean, divided, mean_of_rows])
@pytest.mark.parametrize("size", [4, 1])
def test_a_loss_function_of_the_users(function, size):
    """A mean, a sum over the count that it is given, and a mean over examples of each one's mean."""
    target, _ = hf.true_batches(hf.llama(), hf.texts(), loss_of=of(function))
    trainer = hf.trained(Trainer, hf.llama(), hf.texts(), size=size, every=16 // size, compute_loss_func=function)
    assert hf.distance(trainer.model, target) < 1e-6


def test_an_overridden_compute_loss():
    """As the library's documentation shows it, without the trainer's own."""

    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return mean_of_rows(model(**inputs), labels)

    target, _ = hf.true_batches(hf.llama(), hf.texts(), loss_of=of(mean_of_rows))
    assert hf.distance(hf.trained(Mine, hf.llama(), hf.texts()).model, target) < 1e-6


def test_items_given_by_the_user():
    counted = []

    def items(inputs):
        counted.append(inputs["labels"].shape)
        return (inputs["labels"][:, 1:] != -100).sum()

    target, _ = hf.true_batches(hf.gpt2(), hf.texts())
    trainer = hf.trained(Trainer, hf.gpt2(), hf.texts(), items=items)
    assert hf.distance(trainer.model, target) < 1e-6
    assert len(counted) == 6


def test_the_experiment_is_made_once_and_changes_no_random_numbers():
    """With dropout: the masks, and so the weights, are those of a run whose items are given."""
    calls = []

    class Counted(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            calls.append(torch.is_grad_enabled())
            return super().forward(*args, **kwargs)

    def make():
        config = hf.gpt2(dropout=0.2).config
        torch.manual_seed(0)
        return Counted(config)

    args = {"remove_unused_columns": False}
    given = hf.trained(Trainer, make(), hf.texts(), args=args, items=hf.predicted)
    assert calls == [True] * 6
    calls.clear()
    found = hf.trained(Trainer, make(), hf.texts(), args=args)
    assert (calls.count(False), calls.count(True)) == (9, 6)
    assert hf.distance(found.model, given.model) == 0


def half(step):
    return torch.optim.lr_scheduler.LambdaLR(step, lambda index: 1 - index / 2)


# Older versions name it after the gradient.
CHECKPOINTS = "gradient_checkpointing"
if hasattr(transformers.TrainingArguments, "activation_checkpointing"):
    CHECKPOINTS = "activation_checkpointing"
OPTIONS = {
    "clipping": ({"max_grad_norm": 0.3}, {"clip": 0.3}),
    "AdamW with a schedule": (
        # Some gradients are zero but for rounding, which Adam with a smaller epsilon would make large.
        {"optim": "adamw_torch", "lr_scheduler_type": "linear", "weight_decay": 0.1, "adam_epsilon": 1e-3},
        {"optimizer": lambda model: AdamW(groups(model), 0.1, eps=1e-3), "schedule": half},
    ),
    "smoothed labels": (
        {"label_smoothing_factor": 0.1},
        {"loss_of": lambda model, batch: smoothed(model, batch)},
    ),
    "checkpoints": ({CHECKPOINTS: True}, {}),
    "reentrant checkpoints": (
        {CHECKPOINTS: True, f"{CHECKPOINTS}_kwargs": {"use_reentrant": True}},
        {},
    ),
}


def groups(model):
    """The trainer leaves norms and biases out of the decay."""
    decayed = [
        p for name, p in model.named_parameters() if "norm" not in name and "ln_" not in name and "bias" not in name
    ]
    ids = set(map(id, decayed))
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def smoothed(model, batch):
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return LabelSmoother(0.1)(outputs, batch["labels"], shift_labels=True)


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_the_trainer(case):
    args, own = OPTIONS[case]
    target, seen = hf.true_batches(hf.gpt2(), hf.texts(), **own)
    trainer = hf.trained(Trainer, hf.gpt2(), hf.texts(), args=args)
    assert hf.distance(trainer.model, target) < 1e-6
    assert torch.allclose(torch.tensor(hf.logs(trainer)), torch.tensor(seen), rtol=1e-4)


def test_bfloat16_accumulates_in_float32():
    """The gradient of a model in it is nearer to that of the true batch in float32 than the stock trainer's."""
    data = hf.texts(64)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            seen.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))

    stock = transformers.Trainer
    for kind, size, dtype in ((stock, 64, "float"), (stock, 1, "bfloat16"), (Trainer, 1, "bfloat16")):
        model = getattr(hf.llama().bfloat16(), dtype)()
        hf.trained(kind, model, data, size=size, every=64 // size, callbacks=[Look()])
    target, theirs, ours = seen
    assert (ours - target).norm() < 0.7 * (theirs - target).norm()


@pytest.mark.parametrize("scale", [2.0**0, 2.0**8])
def test_a_scaler_unscales_the_mean_once(scale):
    """On the CPU accelerate makes none."""

    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.accelerator.native_amp = True

    target, seen = hf.true_batches(hf.gpt2(), hf.texts(), clip=0.3)
    trainer = hf.trained(Scaled, hf.gpt2(), hf.texts(), args={"max_grad_norm": 0.3, "fp16": True})
    assert hf.distance(trainer.model, target) < 1e-4  # of float16's rounding
    assert torch.allclose(torch.tensor(hf.logs(trainer)), torch.tensor(seen), rtol=1e-2)


def test_adapters():
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(1)
        return peft.get_peft_model(hf.llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))

    target, _ = hf.true_batches(make(), hf.texts(), optimizer=lambda model: SGD(trainable(model), 0.1))
    trainer = hf.trained(Trainer, make(), hf.texts())
    moved = [p for p, q in zip(trainable(trainer.model), trainable(make()), strict=True) if not torch.equal(p, q)]
    assert len(moved) > 1
    assert hf.distance(trainer.model, target) < 1e-6


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_a_compiled_model():
    data = hf.texts(16, ragged=False)  # of one shape, to be compiled once
    target, _ = hf.true_batches(hf.llama(), data)
    args = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert hf.distance(hf.trained(Trainer, hf.llama(), data, args=args).model, target) < 1e-6


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_data_of_unknown_length_that_end_inside_a_window():
    """The window is applied, as with a known length; the stock Trainer carries it into the next pass."""
    data = hf.texts(21)
    target, seen = hf.true_batches(hf.gpt2(), data)
    trainer = hf.trained(Trainer, hf.gpt2(), Stream(data), args={"max_steps": 2})
    assert trainer.state.global_step == 2
    assert hf.distance(trainer.model, target) < 1e-6
    whole = hf.trained(Trainer, hf.gpt2(), data)
    assert trainer.state.total_flos == whole.state.total_flos
    assert torch.allclose(torch.tensor(hf.logs(trainer)), torch.tensor(seen), rtol=1e-4)
