"""TRL's SFTTrainer with the mix-in, on a model and a tokenizer that are made here.

python examples/trl_sft.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from bigbatch.transformers import BigBatch


class SFT(BigBatch, SFTTrainer):
    """SFTTrainer, accumulating exactly."""


torch.manual_seed(0)
words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(16))]
tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def example():
    """Words that count on from the prompt's last one; ragged."""
    start, length = int(torch.randint(16, ())), int(torch.randint(2, 9, ()))
    counted = [f"w{(start + i) % 16}" for i in range(length + 2)]
    return {"prompt": " ".join(counted[:2]), "completion": " " + " ".join(counted[2:])}


config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
args = SFTConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=8,
    learning_rate=1e-2, max_grad_norm=1.0, logging_strategy="epoch", save_strategy="no", disable_tqdm=True,
    use_cpu=True, bf16=False, report_to=[], dataloader_pin_memory=False,
)  # fmt: skip
rows = Dataset.from_list([example() for _ in range(126)])
trainer = SFT(model=LlamaForCausalLM(config), args=args, train_dataset=rows, processing_class=tokenizer)
trainer.train()
for line in trainer.state.log_history[:-1]:
    print(f"epoch {line['epoch']:2.0f}  loss {line['loss']:.4f}  gradient norm {line['grad_norm']:.3f}")
