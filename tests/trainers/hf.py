"""Tiny random Hugging Face models, ragged texts, and the true batches that a trainer's windows stand for."""

import os
import tempfile

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

WORDS = 48
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, hidden_size=16, **SIZES, **options))


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    special = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, **rates, **special)
    )


def bert(kind=BertForSequenceClassification, dropout=0.0, **options):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return kind(BertConfig(vocab_size=WORDS, hidden_size=16, **SIZES, **rates, **options))


def texts(count=21, ragged=True, prompt=0, seed=0):
    """Examples of 4 to 11 tokens, or all of 8; the labels of the first `prompt` tokens are left out."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 12, (), generator=draw)) if ragged else 8
        tokens = torch.randint(3, WORDS, (length,), generator=draw).tolist()
        examples.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return examples


def labelled(label, count=21):
    """Texts that have one label each."""
    return [{**example, "labels": label(i)} for i, example in enumerate(texts(count))]


def collate(examples):
    """Padded on the right; labels of one a token are padded too."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(rows, fill):
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    labels = [example["labels"] for example in examples]
    tokens = [example["input_ids"] for example in examples]
    of_tokens = isinstance(labels[0], list) and isinstance(labels[0][0], int)
    return {
        "input_ids": padded(tokens, 0),
        "attention_mask": padded([[1] * len(row) for row in tokens], 0),
        "labels": padded(labels, -100) if of_tokens else torch.tensor(labels),
    }


def options(kind=TrainingArguments, size=4, every=4, **given):
    """SGD without clipping, in the data's order, in a folder of its own."""
    defaults = {
        "output_dir": tempfile.mkdtemp(), "num_train_epochs": 1, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "bf16": False,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return kind(per_device_train_batch_size=size, gradient_accumulation_steps=every, **{**defaults, **given})


def trained(kind, model, data, *, size=4, every=4, args=None, **given):
    """A trainer after its training."""
    trainer = kind(
        model=model,
        args=options(size=size, every=every, **args or {}),
        train_dataset=data,
        data_collator=collate,
        **given,
    )
    trainer.train()
    return trainer


def true_batches(model, data, *, window=16, loss_of=None, optimizer=None, clip=None, schedule=None):
    """Each window's whole batch in one piece, in plain PyTorch: the model, and each one's loss and gradient norm."""
    step = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), 0.1)
    scheduler = schedule(step) if schedule else None
    seen = []
    model.train()
    for first in range(0, len(data), window):
        batch = collate(data[first : first + window])
        loss = loss_of(model, batch) if loss_of else model(**batch).loss
        step.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        step.step()
        if scheduler:
            scheduler.step()
        seen.append((loss.item(), norm.item()))
    return model, seen


def logs(trainer):
    """The loss and the gradient's norm of each step."""
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]


def distance(got, target):
    """Of the weights, relative."""
    one, other = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in (got, target))
    return ((one - other).norm() / other.norm()).item()


ON_RANKS = {
    "GPT-2": (gpt2, lambda: texts(24)),
    "classes": (lambda: bert(num_labels=3), lambda: labelled(lambda i: i % 3, 24)),
}


def predicted(inputs):
    """The tokens that a causal model's loss is the mean of."""
    return (inputs["labels"][:, 1:] != -100).sum()


def len_of(inputs):
    return len(inputs["labels"])


def train_in_a_rank(name, size, args, find):
    """On each of two ranks, whose micro-batches are taken by turns."""
    from bigbatch.transformers import Trainer

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29556")  # asked for, and not used: there is a group
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    try:
        given = {} if find else {"items": predicted if name == "GPT-2" else len_of}
        make, data = ON_RANKS[name]
        trainer = trained(Trainer, make(), data(), size=size, args={"ddp_backend": "gloo", **args}, **given)
        kinds = type(trainer.model_wrapped).__name__, trainer.accelerator.num_processes
        return [p.detach() for p in trainer.model.parameters()], logs(trainer), kinds
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name)
        PartialState._reset_state()
