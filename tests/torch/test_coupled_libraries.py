"""Losses of sentence-transformers and OpenCLIP over chunked encoders: the gradients of the whole batch.

The ideas are those of the libraries' own tests: in sentence-transformers a cached loss has the gradients of the plain
one, and in OpenCLIP features that were computed again have those of the whole batch.
"""

import importlib.util
from importlib.metadata import distribution

import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import losses
from torch import nn
from torch.nn import functional as F

import bigbatch.torch as bb

WORDS, WIDTH, LENGTH, ROWS = 40, 8, 6, 11


def openclip_losses():
    """OpenCLIP's file of losses alone: its package imports torchvision, whose wheel fails beside torch's for a CPU."""
    spec = importlib.util.spec_from_file_location(
        "open_clip_loss", str(distribution("open_clip_torch").locate_file("open_clip/loss.py"))
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Words(nn.Module):
    """A module of sentence-transformers: words, a layer, dropout and the mean over the tokens."""

    def __init__(self, drop):
        super().__init__()
        self.words, self.layer, self.drop = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(drop)

    def forward(self, features):
        x = self.drop(torch.tanh(self.layer(self.words(features["input_ids"]))))
        return {**features, "token_embeddings": x, "sentence_embedding": x.mean(1)}


def sentence_model(drop=0.0):
    torch.manual_seed(0)
    return sentence_transformers.SentenceTransformer(modules=[Words(drop)], device="cpu").double()


def gradients(model, loss, columns):
    """Of the model, and of what the loss has learned itself."""
    model.zero_grad()
    torch.manual_seed(1)
    value = loss([{"input_ids": x} for x in columns], torch.linspace(0, 1, ROWS, dtype=torch.float64))
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


def agree(got, right, relative=1e-12):
    for g, r in zip(got, right, strict=True):
        assert (g - r).abs().max() <= relative * r.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("columns", [2, 3])
def test_the_ranking_loss_of_a_chunked_model_has_the_whole_batchs_gradients_and_those_of_their_cached_loss(columns):
    model, given = sentence_model(), torch.randint(WORDS, (columns, ROWS, LENGTH))
    right = gradients(model, losses.MultipleNegativesRankingLoss(model), given)
    agree(gradients(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), given), right)
    model.forward = bb.chunked(model.forward, micro_batch=4)
    agree(gradients(model, losses.MultipleNegativesRankingLoss(model), given), right)


def test_a_loss_of_theirs_that_has_no_cached_form():
    model, given = sentence_model(), torch.randint(WORDS, (2, ROWS, LENGTH))
    right = gradients(model, losses.CoSENTLoss(model), given)
    model.forward = bb.chunked(model.forward, micro_batch=4)
    agree(gradients(model, losses.CoSENTLoss(model), given), right)


def test_dropout_is_replayed_as_their_cached_loss_replays_it():
    """Both draw piece after piece, column after column."""
    model, given = sentence_model(drop=0.5), torch.randint(WORDS, (2, ROWS, LENGTH))
    model.train()
    theirs = gradients(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), given)
    model.forward = bb.chunked(model.forward, micro_batch=4)
    agree(gradients(model, losses.MultipleNegativesRankingLoss(model), given), theirs)


class Clip(nn.Module):
    """Two towers with the methods of OpenCLIP's models."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.GELU(), nn.Flatten(), nn.Linear(4 * WIDTH, WIDTH))
        self.text = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Flatten(), nn.Linear(LENGTH * WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image, normalize=False):
        return F.normalize(self.vision(image), dim=-1) if normalize else self.vision(image)

    def encode_text(self, text, normalize=False):
        return F.normalize(self.text(text), dim=-1) if normalize else self.text(text)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_openclips_losses_of_features_in_pieces(name):
    torch.manual_seed(0)
    clip, loss = Clip().double(), getattr(openclip_losses(), name)
    images, texts = torch.randn(ROWS, 3, 16, 16, dtype=torch.float64), torch.randint(WORDS, (ROWS, LENGTH))
    bias = {"logit_bias": torch.tensor(-1.0)} if name == "SigLipLoss" else {}

    def found(image, text):
        clip.zero_grad()
        value = loss()(image(images, normalize=True), text(texts, normalize=True), clip.logit_scale.exp(), **bias)
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in clip.parameters())]

    right = found(clip.encode_image, clip.encode_text)
    agree(found(*(bb.chunked(encode, micro_batch=4) for encode in (clip.encode_image, clip.encode_text))), right)
