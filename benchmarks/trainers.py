"""Trainers as they come, and with bigbatch: how far from the true batch, and how long an epoch takes.

    python benchmarks/trainers.py [Llama SFTTrainer …] [--seconds 60] [--write]

Exactness: SGD, 21 ragged examples, windows of 4 × 4 and of 4 + 1, tiny random models, float32. Time: 16 windows of
4 × 4 in a model of 4 layers, width 256 and 8,192 words, each contender once a round.
"""

import argparse
import contextlib
import io
import logging
import random
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import accelerate
import datasets
import lightning
import torch
import transformers
from interleaved import circumstances, measure, ratio
from tests.trainers import hf
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import bigbatch.accelerate
import bigbatch.transformers
from bigbatch.lightning import Accumulate
from bigbatch.torch import causal_items

WINDOW, SIZE = 16, 4
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDE_WORDS = 8192


def words(wide):
    return WIDE_WORDS if wide else hf.WORDS


class SFT(bigbatch.transformers.BigBatch, SFTTrainer):
    pass


class DPO(bigbatch.transformers.BigBatch, DPOTrainer):
    pass


def llama(wide):
    sizes = {**hf.SIZES, "hidden_size": 16, **(WIDE if wide else {})}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=words(wide), **sizes))


def gpt2(wide):
    torch.manual_seed(0)
    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4} if wide else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=words(wide), n_positions=32, **sizes, **rates, **special)
    return transformers.GPT2LMHeadModel(config)


def bert(wide):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {**hf.SIZES, "hidden_size": 16, **(WIDE if wide else {})}
    config = transformers.BertConfig(vocab_size=words(wide), num_labels=3, **sizes, **rates)
    return transformers.BertForSequenceClassification(config)


def phrases(columns, count):
    draw = random.Random(0)
    texts = {
        c: [" ".join(f"w{draw.randint(3, 47)}" for _ in range(draw.randint(1, 6))) for _ in range(count)]
        for c in columns
    }
    return datasets.Dataset.from_dict({c: [f" {text}" for text in lines] for c, lines in texts.items()})


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, hf.WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def plain(make, data):
    """transformers.Trainer of one model."""

    def trainer(ours, size, count, wide):
        kind = bigbatch.transformers.Trainer if ours else transformers.Trainer
        args = hf.options(size=size, every=WINDOW // size, logging_strategy="no")
        return kind(make(wide), args, train_dataset=data(count), data_collator=hf.collate)

    trainer.target = lambda: hf.true_batches(make(False), data(21))[0]
    return trainer


def trl(stock, mixed, config, columns):
    def trainer(ours, size, count, wide):
        args = hf.options(config, size=size, every=WINDOW // size, logging_strategy="no")
        given = {"ref_model": llama(wide)} if stock is DPOTrainer else {}
        rows, kind = phrases(columns, count), mixed if ours else stock
        return kind(model=llama(wide), args=args, train_dataset=rows, processing_class=tokenizer(), **given)

    return trainer


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class LightningRun:
    target = staticmethod(lambda: hf.true_batches(gpt2(False), hf.texts(21))[0])

    def __init__(self, ours, size, count, wide):
        self.model = gpt2(wide)
        self.loader = DataLoader(hf.texts(count), batch_size=size, collate_fn=hf.collate)
        self.given = {
            "accumulate_grad_batches": WINDOW // size,
            "max_epochs": 1,
            "accelerator": "cpu",
            "barebones": True,
        }
        self.given["callbacks"] = [Accumulate(items=lambda batch: causal_items(batch["labels"]))] if ours else []

    def train(self):
        lightning.Trainer(**self.given).fit(Module(self.model), self.loader)


class AccelerateRun:
    target = staticmethod(lambda: hf.true_batches(gpt2(False), hf.texts(21))[0])

    def __init__(self, ours, size, count, wide):
        self.ours, self.model = ours, gpt2(wide)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=WINDOW // size)
        loader = DataLoader(hf.texts(count), batch_size=size, collate_fn=hf.collate)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.prepared = self.accelerator.prepare(self.model, optimizer, loader)

    def train(self):
        model, optimizer, loader = self.prepared
        for batch in loader:
            with self.accelerator.accumulate(model):
                loss = model(**batch).loss
                if self.ours:
                    bigbatch.accelerate.backward(self.accelerator, loss, items=causal_items(batch["labels"]))
                else:
                    self.accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


TRAINERS = {
    "Trainer, Llama": plain(llama, hf.texts),
    "Trainer, GPT-2": plain(gpt2, hf.texts),
    "Trainer, BertForSequenceClassification": plain(bert, lambda n: hf.labelled(lambda i: i % 3, n)),
    "SFTTrainer, Llama": trl(SFTTrainer, SFT, SFTConfig, ["prompt", "completion"]),
    "DPOTrainer, Llama": trl(DPOTrainer, DPO, DPOConfig, ["prompt", "chosen", "rejected"]),
    "Lightning, GPT-2": LightningRun,
    "accelerate, GPT-2": AccelerateRun,
}


def trained(make, ours, size):
    run = make(ours, size, 21, False)
    run.train()
    return run.model


def epoch(make, ours):
    """Trains again and again for an epoch. Returns its seconds, less what is done before and after all windows."""
    run = make(ours, SIZE, 16 * WINDOW, True)

    def timed():
        started = time.perf_counter()
        run.train()
        return time.perf_counter() - started

    return timed


def row(name, make, seconds):
    """One line of the table."""
    target = make.target() if hasattr(make, "target") else trained(make, False, WINDOW)
    stock, ours = (hf.distance(trained(make, ours, SIZE), target) for ours in (False, True))
    contenders = {"stock": epoch(make, False), "ours": epoch(make, True)}
    once = measure(contenders, 1, warm_up=1)
    repetitions = max(5, int(seconds / sum(timing.median for timing in once.values())))
    timings = measure(contenders, repetitions, warm_up=0)
    medians = " | ".join(f"{timings[each].median:.2f}" for each in contenders)
    return f"| {name} | {stock:.1e} | {ours:.1e} | {medians} | {ratio(timings, 'ours', 'stock'):.2f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names")
    parser.add_argument("--seconds", type=float, default=60, help="for the time of each trainer")
    parser.add_argument("--write", action="store_true", help="write benchmarks/trainers.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    lines = ["| | stock: off by | ours: off by | stock: s an epoch | ours | ours / stock |", "| --- |" + " ---: |" * 5]
    for name, make in TRAINERS.items():
        if not options.names or any(part in name for part in options.names):
            with contextlib.redirect_stdout(io.StringIO()):
                lines.append(row(name, make, options.seconds))
            print(lines[-1], flush=True)
    if options.write:
        command = f"python benchmarks/trainers.py --seconds {options.seconds:g} --write"
        versions = circumstances("torch", "transformers", "trl", "accelerate", "lightning")
        shown = "\n".join(lines)
        Path(__file__).with_suffix(".md").write_text(f"{HEAD}\n{shown}\n\n{versions}.\n\n    {command}\n")


HEAD = """# Trainers

*Off by* is the relative distance of the weights from those of the true batches of 16 and 5, trained in plain PyTorch,
or with TRL's own trainer where its loss is TRL's: SGD, 21 ragged examples, micro-batches of 4 (4 × 4, then 4 + 1), tiny
random models in float32. An *epoch* is 16 windows of 4 × 4 in a model four layers deep, 256 wide, with 8,192 words, on
one thread: `train()`, with all that it does before and after the windows. Stock and ours take turns; the ratio is the
median over rounds of both times in one round.
"""


if __name__ == "__main__":
    main()
