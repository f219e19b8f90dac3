"""The demo in PyTorch: the loops are what a user would write."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch.torch as bb
from bigbatch.audit import Audit
from bigbatch.demo import Job, Result, Way
from bigbatch.engines.torch_memory import PeakMemory


def train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    """Trains one way. See `bigbatch.demo.Train`."""
    x, y, x_test, y_test = map(torch.from_numpy, job.data)
    model = network(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=job.weight_decay)
    updates = job.updates(job.micro_batch if way == "micro" else job.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: job.rate_at(k, updates) / job.rate)
    every = job.batch // job.micro_batch
    acc = bb.Accumulator(optimizer, every, clip_norm=job.clip_norm, scheduler=scheduler, noise=1)

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    def plain(rows: Tensor) -> float:
        loss = loss_fn((x[rows], y[rows]))
        loss.backward()
        step()
        return loss.item()

    def split(rows: Tensor) -> float:
        loss = bb.backward(loss_fn, (x[rows], y[rows]), micro_batch=job.micro_batch)
        step()
        return loss.item()

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def stream(rows: Tensor) -> float:
        made = None
        for part in rows.split(job.micro_batch):
            made = acc.backward(loss_fn((x[part], y[part])), items=len(part))
        made = made or acc.flush()  # the last window of an epoch is not full
        return made.loss if made else math.nan

    update = {"micro": plain, "full": plain, "stream": stream, "split": split}[way]
    windows = job.batches(job.micro_batch if way == "micro" else job.batch)
    seen, seconds, losses, peak_bytes = 0, 0.0, [], 0
    for rows in windows:
        started = time.perf_counter()
        # Watched for memory and left out of the time. The optimizer's state is there by then, and the batch is full.
        with PeakMemory() if len(losses) == 2 else nullcontext() as memory:
            loss = update(torch.from_numpy(rows))
        if memory is None:
            seconds += time.perf_counter() - started
        else:
            peak_bytes = memory.peak
        seen += len(rows)
        losses.append((seen, loss))
        advance(len(rows))
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).double().mean().item()
    advice = None
    if way == "stream":
        advice = str(bb.advice(acc.noise_scale, batch=job.batch, micro_batch=job.micro_batch, beta2=0.999))
    return Result(losses, accuracy, layers(model), peak_bytes, seconds, advice)


def audit(job: Job) -> Audit:
    """Of the job's network with a BatchNorm put in, on 64 examples: what accumulation cannot make exact."""
    x, y = (torch.from_numpy(part[:64]) for part in job.data[:2])
    model = network(job)
    model.insert(1, nn.BatchNorm1d(job.layers[0][1].size, dtype=x.dtype))
    return bb.audit(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), model, (x, y), micro_batch=16)


def network(job: Job) -> nn.Sequential:
    """The job's network, with its initial weights."""
    modules: list[nn.Module] = []
    for kernel, bias in job.layers:
        linear = nn.Linear(*kernel.shape, dtype=getattr(torch, job.dtype))
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(kernel.T))
            linear.bias.copy_(torch.from_numpy(bias))
        modules += [linear, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def layers(model: nn.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    """The network's weights as the job gave them."""
    linears = [module for module in model if isinstance(module, nn.Linear)]
    return [(m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy()) for m in linears]
