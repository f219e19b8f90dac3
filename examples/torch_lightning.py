"""Lightning's manual optimization: bigbatch takes the place of `manual_backward`, `step` and `zero_grad`.

With automatic optimization, see lightning_accumulate.py.

torchrun --nproc-per-node 2 examples/torch_lightning.py
"""

import os

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import bigbatch.torch as bb


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        pixels, labels = load_digits(return_X_y=True)
        dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
        # Every rank its own part; Lightning's sampler would repeat examples to make the parts equal.
        part = range(self.global_rank, len(dataset), self.trainer.world_size)
        return DataLoader(Subset(dataset, part), batch_size=16, shuffle=True)

    def on_train_start(self):
        # trainer.model is the DistributedDataParallel that Lightning put around this module.
        self.acc = bb.Accumulator(self.trainer.optimizers[0], every=8, clip_norm=1.0, model=self.trainer.model)

    def on_train_epoch_start(self):
        self.updates = []

    def training_step(self, batch):
        x, y = batch
        if update := self.acc.backward(F.cross_entropy(self.net(x), y), items=len(x)):
            self.updates.append(update)

    def on_train_epoch_end(self):
        if update := self.acc.flush():
            self.updates.append(update)
        examples = sum(update.items for update in self.updates)
        loss = sum(update.items * update.loss for update in self.updates) / examples
        if self.trainer.is_global_zero:
            line = f"epoch {self.current_epoch:2d}  {len(self.updates)} updates  {examples:.0f} examples"
            print(f"{line}  loss {loss:.4f}")


L.seed_everything(0, verbose=False)
model = Digits()
trainer = L.Trainer(
    accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), strategy="ddp", max_epochs=10,
    use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(model)
if trainer.is_global_zero:
    print(model.acc)
