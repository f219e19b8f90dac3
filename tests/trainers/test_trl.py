"""`BigBatch` before TRL's and sentence-transformers' trainers, against the same trainer on the true batches."""

import random

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from bigbatch.transformers import BigBatch
from trainers import hf

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own deprecations


class SFT(BigBatch, SFTTrainer):
    pass


class DPO(BigBatch, DPOTrainer):
    pass


class GRPO(BigBatch, GRPOTrainer):
    pass


@pytest.fixture(autouse=True)
def _no_bars():
    datasets.disable_progress_bars()


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, hf.WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def phrases(columns, count=21):
    """Rows of 1 to 6 words in each column."""
    draw = random.Random(0)
    return datasets.Dataset.from_list(
        [
            {column: " " + " ".join(f"w{draw.randint(3, 47)}" for _ in range(draw.randint(1, 6))) for column in columns}
            for _ in range(count)
        ]
    )


def compared(stock, ours, config, size, model=hf.llama, window=16, steps=None, data=None, args=None, **given):
    """How far the weights are from those of the stock trainer on the true batches."""
    trainers = []
    for kind, size_, every in ((stock, window, 1), (ours, size, window // size)):
        options = hf.options(config, size=size_, every=every, max_steps=steps or -1, **args or {})
        extra = {"ref_model": model()} if issubclass(kind, DPOTrainer) else {}
        trainer = kind(model=model(), args=options, train_dataset=data, processing_class=tokenizer(), **extra, **given)
        trainer.train()
        trainers.append(trainer)
    target, trainer = trainers
    assert torch.allclose(torch.tensor(hf.logs(trainer)), torch.tensor(hf.logs(target)), rtol=1e-4, atol=1e-6)
    return hf.distance(trainer.model, target.model)


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("args", [{}, {"loss_type": "dft"}, {"max_grad_norm": 0.3, "packing": True, "max_length": 16}])
def test_sft(size, args):
    data = phrases(["prompt", "completion"])
    assert compared(SFTTrainer, SFT, SFTConfig, size, data=data, args=args) < 1e-6


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("args", [{}, {"precompute_ref_log_probs": True}])
def test_dpo(size, args):
    """Whose loss is ln 2 for all pairs before the first step."""
    data = phrases(["prompt", "chosen", "rejected"])
    assert compared(DPOTrainer, DPO, DPOConfig, size, data=data, args=args) < 1e-6


def test_dpo_of_two_means():
    """Over pairs, and over the chosen tokens."""
    data = phrases(["prompt", "chosen", "rejected"])
    with pytest.raises(ValueError, match="Pass items="):
        compared(
            DPOTrainer, DPO, DPOConfig, 4, data=data, args={"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1]}
        )


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_grpo(loss_type):
    """Losses that are sums over what the trainer counted, means over examples, and means over tokens."""
    data = phrases(["prompt"], 8)
    args = {"num_generations": 4, "max_completion_length": 8, "loss_type": loss_type, "seed": 1, "beta": 0.0}

    def reward(completions, **_):
        return [float(len(text) % 7) for text in completions]

    def model():
        return hf.llama(eos_token_id=1)

    args["train_sampling_strategy"] = "random"
    given = {"model": model, "window": 8, "steps": 2, "data": data, "args": args, "reward_funcs": reward}
    assert compared(GRPOTrainer, GRPO, GRPOConfig, 2, **given) < 1e-6


def test_sentence_transformers(tmp_path):
    """A mean over pairs is exact, and in-batch negatives are refused."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import losses
    from sentence_transformers.models import Pooling, Transformer

    class Ours(BigBatch, library.SentenceTransformerTrainer):
        pass

    sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **hf.SIZES}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=hf.WORDS, hidden_size=16, **sizes)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    data = phrases(["a", "b"])
    scores = datasets.Dataset.from_list([{**row, "label": i / 21} for i, row in enumerate(data)])

    def trained(kind, loss, rows, size, every):
        model = library.SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(16)], device="cpu")
        args = hf.options(
            library.SentenceTransformerTrainingArguments, size=size, every=every, train_sampling_strategy="random"
        )
        trainer = kind(model=model, args=args, train_dataset=rows, loss=loss(model))
        trainer.train()
        return trainer.model

    target = trained(library.SentenceTransformerTrainer, losses.CosineSimilarityLoss, scores, 16, 1)
    assert hf.distance(trained(Ours, losses.CosineSimilarityLoss, scores, 4, 4), target) < 1e-6
    with pytest.raises(ValueError, match="in-batch negatives"):
        trained(Ours, losses.MultipleNegativesRankingLoss, data, 4, 4)
