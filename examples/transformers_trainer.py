"""Hugging Face's Trainer, changed in one line: `Trainer` comes from bigbatch.

python examples/transformers_trainer.py
torchrun --nproc-per-node 2 examples/transformers_trainer.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from bigbatch.transformers import Trainer  # was: from transformers import Trainer

WORDS = 32


def texts(count):
    """Each token is the one before, plus three; ragged."""
    starts, lengths = torch.randint(WORDS, (count,)).tolist(), torch.randint(4, 13, (count,)).tolist()
    rows = [[(start + 3 * i) % WORDS for i in range(n)] for start, n in zip(starts, lengths, strict=True)]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill):
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}


torch.manual_seed(0)
config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
args = TrainingArguments(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, gradient_accumulation_steps=4, num_train_epochs=12,
    learning_rate=1e-2, max_grad_norm=1.0, lr_scheduler_type="cosine", logging_strategy="epoch", save_strategy="no",
    disable_tqdm=True, use_cpu=True, report_to=[], dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(model=GPT2LMHeadModel(config), args=args, train_dataset=texts(256), data_collator=collate)
trainer.train()
for line in trainer.state.log_history[:-1]:
    print(f"epoch {line['epoch']:2.0f}  loss {line['loss']:.4f}  gradient norm {line['grad_norm']:.3f}")
