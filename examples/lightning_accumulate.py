"""Lightning's automatic optimization, with one callback more.

python examples/lightning_accumulate.py
torchrun --nproc-per-node 2 examples/lightning_accumulate.py
"""

import os

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from bigbatch.lightning import Accumulate
from bigbatch.torch import causal_items

WORDS, PAD = 32, -100


def texts(count):
    """Each token is the one before, plus three; ragged, and padded to 12."""
    labels = (torch.randint(WORDS, (count, 1)) + 3 * torch.arange(12)) % WORDS
    return labels.masked_fill(torch.arange(12) >= torch.randint(3, 13, (count, 1)), PAD)


class Language(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(WORDS, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, WORDS))

    def training_step(self, labels, batch_idx):
        scores = self.net(labels[:, :-1].clamp(min=0))
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PAD)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_end(self):
        update = accumulate.update
        if self.trainer.is_global_zero:
            print(f"epoch {self.current_epoch}  loss {update.loss:.4f} over {update.items:.0f} tokens")


L.seed_everything(0, verbose=False)
accumulate = Accumulate(items=causal_items)  # a function of the batch, which is the labels here
trainer = L.Trainer(
    accumulate_grad_batches=4, callbacks=[accumulate], gradient_clip_val=1.0, max_epochs=8, accelerator="cpu",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Language(), DataLoader(texts(256), batch_size=8, shuffle=True))
