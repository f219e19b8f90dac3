"""Which ranks a model is trained on, by the way it is wrapped."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bigbatch import errors
from bigbatch.engines.torch_fsdp import is_spread, shards_in
from bigbatch.torch.collectives import Meetings
from bigbatch.torch.ddp import Replicas
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.fsdp import Shards

Sync = Literal["window", "micro_batch"]


def ranks_of(model: Any, sync: Sync | None, call: str) -> Ranks | None:
    """The ranks that a model is trained on, or None where it is not wrapped and there is one process.

    One process with a wrapped model is a rank too, so that a trial on one refuses what several do.

    Raises:
        TypeError, ValueError: several processes train it, and it is not wrapped in a way that is known here. The other
            ranks then get an error too.
    """
    try:
        return _ranks_of(model, sync)
    except (TypeError, ValueError) as error:
        if dist.is_available() and dist.is_initialized():
            device = torch.device(dist.get_backend_config().partition(":")[0])
            Meetings(dist.group.WORLD, device).report(call, error)
        raise


def _ranks_of(model: Any, sync: Sync | None) -> Ranks | None:
    if sync is not None:
        errors.check_choice("sync", sync, ("window", "micro_batch"))
    if model is None:
        if sync is not None:
            raise _no_sync(sync, "no model")
        return None
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module. {errors.received('model', model)} "
            "Pass the DistributedDataParallel or fully_shard model that the forward goes through."
        )
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    replicas, shards = [m for m in model.modules() if isinstance(m, DistributedDataParallel)], shards_in(model)
    if sync is not None and not shards:
        raise _no_sync(sync, f"a {type(model).__name__}")
    if replicas and not shards:
        return Ranks(Replicas(replicas))
    if shards and not replicas:
        return Ranks(Shards(model, sync or "window"))
    if several or replicas or _is_otherwise_spread(model):
        raise ValueError(
            "model must be wrapped in DistributedDataParallel or by fully_shard where there are several ranks. "
            f"Received: model of type {type(model).__name__}, {dist.get_world_size() if several else 1} ranks. "
            "Without either the ranks would not even start from the same parameters."
        )
    return None


def _is_otherwise_spread(model: torch.nn.Module) -> bool:
    """Whether FSDP1 or tensor parallelism has it."""
    return any(is_spread(p) or hasattr(p, "_is_flat_param") for p in model.parameters())


def _no_sync(sync: Any, model: str) -> Exception:
    return ValueError(
        "sync says when a fully_shard model adds up over the ranks. "
        f"{errors.received('sync', sync)[:-1]}, and {model}. Leave it out; others do so once a window."
    )
