"""The search and the budget: whatever memory does, what comes out was itself predicted to fit."""

import logging
import math
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch import host
from bigbatch.host import Memory
from bigbatch.plan import Budget, Candidate, Choice, budget, choose, fitting, sizes, timed

DEVICE = Memory(in_use=2 << 30, free=6 << 30, limit="the machine")


def search(needs, batch, headroom, **options):
    asked = []

    def counted(size):
        asked.append(size)
        return needs(size)

    plan = choose(counted, batch, Budget(0, headroom, "a test"), lambda: "by a formula", **options)
    return plan, asked


@st.composite
def problems(draw):
    """A batch, and any memory function at all: steps, saws, noise, with a trend or without."""
    batch = draw(st.integers(1, 5000))
    seed, trend = draw(st.integers(0, 2**32)), draw(st.sampled_from([0, 1, 7, -3]))
    noise = draw(st.sampled_from([0, 10, 1000, 100000]))
    step = draw(st.sampled_from([1, 3, 64]))

    def needs(size):
        return 1 + abs(trend * (size // step * step) + hash((seed, size)) % (noise + 1))

    return batch, needs, draw(st.integers(0, 40000))


@given(problems())
@settings(max_examples=400, deadline=None)
def test_what_is_chosen_was_predicted_to_fit(problem):
    batch, needs, headroom = problem
    try:
        plan, asked = search(needs, batch, headroom)
    except (MemoryError, ValueError):
        tried = [size for size in (2**k for k in range(11)) if size < batch] + [batch]
        assert all(needs(max(s for s in sizes(batch) if s <= size)) > headroom for size in tried)
        return
    assert needs(plan.micro_batch) <= headroom
    assert plan.micro_batch == plan.largest
    assert plan.micro_batch in asked
    assert len(asked) == len(set(asked)), "a prediction is dear"
    assert len(asked) <= 12 + 12 + 1


@given(st.integers(1, 5000), st.integers(1, 50), st.integers(0, 2000), st.floats(0.5, 2), st.integers(0, 100000))
@settings(max_examples=400, deadline=None)
def test_where_memory_only_grows_it_is_the_largest(batch, slope, constant, power, headroom):
    def needs(size):
        return constant + int(slope * size**power)

    best = max((size for size in sizes(batch) if needs(size) <= headroom), default=None)
    try:
        plan, _ = search(needs, batch, headroom, tries=1000)
    except MemoryError:
        assert best is None
    else:
        assert plan.micro_batch == best


@pytest.mark.parametrize("batch", [64, 1000, 4096, 100000])
def test_a_straight_line_takes_five_predictions(batch):
    for headroom in range(100, 3 * batch, max(1, batch // 50)):
        _, asked = search(lambda size: 50 + 3 * size, batch, headroom)
        assert len(asked) <= 5, (headroom, asked)


def test_a_dear_prediction_need_not_be_the_last():
    plan, asked = search(lambda size: 50 + 3 * size, 4096, 3200, enough=0.9)
    assert asked == [4096, 512, 1024]
    assert plan.needs >= 0.9 * 3200


def test_one_example_may_need_more_than_two():
    plan, _ = search(lambda size: 900 if size == 1 else 100 * size, 64, 450)
    assert plan.micro_batch == 4


@given(st.integers(1, 3000))
def test_sizes_are_the_least_for_each_number_of_micro_batches(batch):
    assert sizes(batch) == sorted({-(-batch // count) for count in range(1, batch + 1)})


def test_no_size_fits():
    with pytest.raises(MemoryError, match=r"No micro-batch fits in memory\. A micro-batch of 1 needs 100 bytes beside"):
        search(lambda size: 100 * size, 8, 99)
    with pytest.raises(ValueError, match=r"memory is too small for the model\. Received: memory='1KiB' \(str\)\."):
        search(lambda size: 4096 * size, 8, 1024, given="1KiB")


def test_the_fastest_of_those_that_fit():
    def needs(size):
        return 10**9 if size == 16 else 100 * size

    plan, _ = search(needs, 64, 3200)
    asked = []

    def seconds(size):
        asked.append(size)
        return size * (1.0 if size > 8 else 0.5)

    quick = timed(plan, needs, seconds)
    assert plan.micro_batch == 32
    assert asked == [32, 8, 4, 2], "16 would not fit, and is not run"
    assert quick.micro_batch == 8
    assert quick.largest == 32
    assert Candidate(8, 800, 4.0) in quick.candidates


@pytest.mark.parametrize(
    ("memory", "headroom"),
    [
        (None, int((6 << 30) * 0.9)), ("8GiB", 6 << 30), ("3 GB", 3 * 10**9 - (2 << 30)), ("2.5GiB", 1 << 29),
        (3 << 30, 1 << 30), (0.5, 3 << 30), (1.0, 6 << 30), ("1GiB", 0),
    ],
)  # fmt: skip
def test_budget(memory, headroom):
    allowed = budget(memory, DEVICE)
    assert allowed.headroom == headroom
    assert allowed.in_use == DEVICE.in_use


def test_budget_says_its_reserve_and_what_it_keeps():
    assert budget(None, DEVICE).source == "6 GiB free by the machine, less a reserve of 10%"
    kept = budget(None, DEVICE, keep=1 << 30, reserve=0.5)
    assert kept.headroom == 2 << 30
    assert kept.source == "6 GiB free by the machine, less a reserve of 50%, 1 GiB kept for the optimizer's state"


@pytest.mark.parametrize("memory", ["lots", "8 gib", "8GiB free", "", "-8GiB", "0GiB", -1, 0, 0.0, -0.5, 1.5, "9GiB",
                                    9 << 30, math.nan, math.inf])  # fmt: skip
def test_a_budget_without_sense_is_refused(memory):
    with pytest.raises(ValueError, match=r"^memory must .* Received: memory="):
        budget(memory, DEVICE)


@pytest.mark.parametrize("memory", [True, [8], b"8GiB"])
def test_a_budget_of_another_type_is_refused(memory):
    with pytest.raises(TypeError, match=r"^memory must be a size or a fraction\. Received: memory="):
        budget(memory, DEVICE)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB available, whose process holds 100 MiB; add files to limit it."""
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    write("proc/self/status", "Name: python\nVmSize: 1048576 kB\nVmRSS: 102400 kB\nVmData: 524288 kB\n")
    return tmp_path, write


def test_what_the_machine_leaves(machine):
    root, _ = machine
    assert host.memory(root) == Memory(100 << 20, 8 << 30, "the machine")


def test_what_a_cgroup_leaves(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/user/job\n")
    write("sys/fs/cgroup/user/job/memory.max", "max\n")
    write("sys/fs/cgroup/user/job/memory.current", "5\n")
    assert host.memory(root).limit == "the machine"
    write("sys/fs/cgroup/user/memory.max", f"{4 << 30}\n")
    write("sys/fs/cgroup/user/memory.current", f"{3 << 30}\n")
    write("sys/fs/cgroup/user/memory.stat", f"anon 7\ninactive_file {1 << 30}\n")
    assert host.memory(root) == Memory(100 << 20, 2 << 30, "its cgroup"), "a parent's limit, less what would give way"


def test_what_an_old_cgroup_leaves_to_a_container(machine):
    root, write = machine
    write("proc/self/cgroup", "4:cpu,memory:/docker/abc\n1:cpuset:/\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{1 << 30}\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{900 << 20}\n")
    write("sys/fs/cgroup/memory/memory.stat", f"total_inactive_file {100 << 20}\n")
    assert host.memory(root) == Memory(100 << 20, 224 << 20, "its cgroup")


def test_what_ulimit_leaves(machine, monkeypatch):
    root, _ = machine
    limits = {resource.RLIMIT_AS: 4 << 30, resource.RLIMIT_DATA: 2 << 30}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], resource.RLIM_INFINITY))
    assert host.memory(root) == Memory(100 << 20, (2 << 30) - (512 << 20), "ulimit -d")
    limits[resource.RLIMIT_AS] = 1 << 30
    assert host.memory(root) == Memory(100 << 20, 0, "ulimit -v")


def test_ranks_on_one_machine_share_it(machine, monkeypatch):
    root, _ = machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert host.memory(root) == Memory(100 << 20, 4 << 30, "the machine, shared by 2 ranks")


def test_this_machine():
    in_use, free, limit = host.memory()
    assert in_use > 1 << 20
    assert free > 1 << 20
    assert limit


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 20, "1 MiB"), (310.4 * 2**20, "310 MiB"),
                       (1.5 * 2**30, "1.5 GiB"), (3 << 40, "3 TiB")],
)  # fmt: skip
def test_bytes_in_words(size, text):
    assert host.format_bytes(size) == text


@pytest.fixture
def made():
    plan, _ = search(lambda size: size << 20, 64, 40 << 20, notes=("Workspaces are in.",))
    return plan


def test_the_table(made, capsys):
    made.show()
    printed = capsys.readouterr().out
    shown = " ".join(printed.split())
    assert "For a batch of 64 a micro-batch may take 40 MiB beside the 0 bytes in use (a test)." in shown
    assert "too large" in shown
    assert "80% largest" in shown
    assert "Needs: by a formula. Workspaces are in." in shown
    assert shown.endswith("micro_batch=32")
    assert max(map(len, printed.splitlines())) <= 80
    timed(made, lambda size: size << 20, lambda size: size * 1e-3 if size > 8 else size * 1e-4).show()
    assert "0.1 ms fastest" in " ".join(capsys.readouterr().out.split())


def test_the_plan_in_a_line(made):
    assert str(made) == (
        "micro_batch 32 of a batch of 64 (2 micro-batches) needs 32 MiB of 40 MiB (a test), by a formula"
    )


def test_the_figure(made, tmp_path):
    made.save(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    timed(made, lambda size: size << 20, lambda size: 1.0).save(str(tmp_path / "timed.svg"))
    assert "ms an example" not in (tmp_path / "plan.png").read_text(errors="ignore")
    assert (tmp_path / "timed.svg").stat().st_size > 5000


class Full(Exception):
    """A framework's out-of-memory."""


def fit(made, limit, length=64, other=None):
    """`fitting` on a machine that holds `limit` examples: the sizes tried, and what each run found restored."""
    choice, tried, written = Choice(made, made.micro_batch), [], [0]

    def save():
        before = list(written)
        return lambda: written.__setitem__(slice(None), before)

    def run(size):
        assert written == [0], "the run before was not taken back"
        written[0] += 1
        tried.append(size)
        if other is not None:
            raise other
        if size > limit:
            raise Full
        return size

    result = fitting(run, choice, length, lambda error: isinstance(error, Full), logging.getLogger("bigbatch"), save)
    return result, choice, tried


def test_out_of_memory_halves_and_keeps_the_smaller_size(made, caplog):
    result, choice, tried = fit(made, limit=9)
    assert (result, choice.micro_batch, tried) == (8, 8, [32, 16, 8])
    assert "out of memory at 32; the window is run again with 16." in caplog.text


def test_a_batch_of_another_length_comes_in_even_micro_batches(made):
    assert fit(made, limit=64, length=33)[2] == [17]


def test_not_even_one_example_fits(made):
    with pytest.raises(Full) as caught:
        fit(made, limit=0)
    assert "not even one example at a time fits. Planned was: micro_batch 32" in caught.value.__notes__[0]


def test_another_error_is_not_tried_again(made):
    error = ValueError("shapes")
    with pytest.raises(ValueError, match="shapes") as caught:
        fit(made, limit=64, other=error)
    assert caught.value is error


@pytest.mark.parametrize("text", [
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 2.00 GiB total capacity)",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "XPU out of memory. Tried to allocate 20.00 MiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "MPS backend out of memory (MPS allocated: 17.94 GB, other allocations: 1.00 GB, max allowed: 18.13 GB).",
    "Invalid buffer size: 58.50 GiB",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "unable to mmap 96 bytes from file </torch_1>: Cannot allocate memory (12)",
    "std::bad_alloc",
    "RESOURCE_EXHAUSTED: Out of memory allocating 137438953472 bytes.",
    "INTERNAL: CpuCallback error calling callback: MemoryError: Unable to allocate 9.00 GiB",
    "INTERNAL: Failed to allocate: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "Exception encountered when calling Dense.call(). Unable to allocate 9 GiB for an array with shape (9,) and",
])  # fmt: skip
def test_allocators_words_for_an_out_of_memory(text):
    assert host.is_out_of_memory(RuntimeError(text))
    assert not host.is_out_of_memory(ValueError(text)), "no allocator raises that"


def test_a_memory_error_needs_no_words():
    assert host.is_out_of_memory(MemoryError())


@pytest.mark.parametrize("text", [
    "", "out of memory", "CUDA error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", "shape '[3]' is invalid for input of size 4",
    "out of resource: shared memory, Required: 99, Hardware limit: 64", "INTERNAL: std::exception",
    "RESOURCE_EXHAUSTED: /tmp/file; No space left on device", "RESOURCE_EXHAUSTED: /tmp/file; Too many open files",
    "the dataset's quota is used up",
])  # fmt: skip
def test_other_errors_are_none(text):
    assert not host.is_out_of_memory(RuntimeError(text))
