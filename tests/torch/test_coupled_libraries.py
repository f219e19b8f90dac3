"""Losses of sentence-transformers and OpenCLIP over chunked encoders: the gradients of the whole batch.

The ideas are those of the libraries' own tests: in sentence-transformers a cached loss has the gradients of the plain
one, and in OpenCLIP features that were computed again have those of the whole batch.
"""

import contextlib

import pytest
import torch
from torch import nn

import bigbatch.torch as bb

# torchvision from the package index needs CUDA, and cannot even be imported without these two operators otherwise.
with contextlib.suppress(RuntimeError):
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
import sentence_transformers
from open_clip.loss import ClipLoss, SigLipLoss
from sentence_transformers.sentence_transformer import losses

WORDS, WIDTH, LENGTH, ROWS = 40, 8, 6, 11


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


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(layers=1, width=16, heads=2, vocab_size=WORDS, context_length=LENGTH)
    return open_clip.CLIP(8, vision, text).double()


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_openclips_losses_of_features_in_pieces(loss, clip):
    images, texts = torch.randn(ROWS, 3, 16, 16, dtype=torch.float64), torch.randint(WORDS, (ROWS, LENGTH))
    bias = {"logit_bias": torch.tensor(-1.0)} if loss is SigLipLoss else {}

    def found(image, text):
        clip.zero_grad()
        value = loss()(image(images, normalize=True), text(texts, normalize=True), clip.logit_scale.exp(), **bias)
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in clip.parameters())]

    right = found(clip.encode_image, clip.encode_text)
    agree(found(*(bb.chunked(encode, micro_batch=4) for encode in (clip.encode_image, clip.encode_text))), right)
