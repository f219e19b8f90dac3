"""Processes that are the ranks of one gloo group, and run what they are sent.

They live as long as the test run, so that a test costs a message and not the start of four interpreters.
"""

import atexit
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 60  # a rank that has not answered by then hangs


class Pool:
    """The ranks of one group."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        # With --hide-fused a rank has to hide the folder before it imports bigbatch.
        hidden = "bigbatch.fused" in sys.modules and sys.modules["bigbatch.fused"] is None
        ours = [] if hidden else ["conformance.adapters.ranks"]
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", *ours])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            arguments = (rank, size, os.path.join(self.folder.name, "rendezvous"), theirs, hidden)
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(pipe)
        atexit.register(self.close)

    def outcomes(self, function: Callable[..., Any], *arguments: Any, each: Any = None) -> list[Any]:
        """What `function(*arguments)` returns or raises on every rank; of `each`, a rank gets its own, at the end."""
        for rank, pipe in enumerate(self.pipes):
            pipe.send((function, arguments if each is None else (*arguments, each[rank])))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} hangs in {function.__name__}")
            answers.append(pipe.recv())
        return answers

    def run(self, function: Callable[..., Any], *arguments: Any, each: Any = None) -> list[Any]:
        """As `outcomes`, and raises what a rank raised."""
        answers = self.outcomes(function, *arguments, each=each)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
        pool.cache_clear()


@functools.cache
def pool(size: int) -> Pool:
    """The one pool of so many ranks."""
    return Pool(size)


def serve(rank: int, size: int, rendezvous: str, pipe: Any, hidden: bool) -> None:
    """A rank: runs what it is sent until the pipe closes."""
    if hidden:
        sys.modules["bigbatch.fused"] = None
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    for _ in itertools.count():
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = error
            error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        pipe.send(answer)
