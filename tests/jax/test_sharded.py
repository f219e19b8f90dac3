"""Eight devices: exact on every kind of mesh axis, and one reduction a window."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def results():
    # The number of devices is fixed when JAX starts.
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    script = Path(__file__).with_name("on_eight_devices.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


MESHES = ["mesh Auto", "mesh Explicit"] + [
    f"shard_map {kind} check_vma={check}" for kind in ("Auto", "Explicit") for check in (True, False)
]


CHUNKED = [f"chunked {kind} check_vma={check}" for kind in ("Auto", "Explicit") for check in (True, False)]
BOTH = [f"{what} {kind}" for what in ("compiler", "model", "spread") for kind in ("Auto", "Explicit")]


@pytest.mark.parametrize("case", [*MESHES, *BOTH, *CHUNKED, "terms", "aux", "ragged", "documented"])
def test_it_is_the_full_batchs(results, case):
    assert results[case]["error"] < 1e-13


@pytest.mark.parametrize("case", MESHES)
def test_one_reduction_a_window_and_none_in_the_loop(results, case):
    assert [(c["kind"], c["inside"]) for c in results[case]["collectives"]] == [("all-reduce", False)]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_beside_a_model_axis_only_the_model_talks_in_the_loop(results, kind):
    found = results[f"model {kind}"]["collectives"]
    inside = {c["groups"] for c in found if c["inside"]}
    outside = {c["groups"] for c in found if not c["inside"]}
    assert inside == {"[4,2]<=[8]"}  # pairs of neighbours: the model axis
    # Fours: the data axis, which JAX 0.11 and newer call by its name.
    assert outside in ({"{{0,2,4,6},{1,3,5,7}}"}, {"mesh['data'=4,'model'=2] {'data'}"})


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_the_compiler_alone_reduces_in_the_loop_and_never_moves_the_batch(results, kind):
    found = results[f"compiler {kind}"]["collectives"]
    assert {c["kind"] for c in found} == {"all-reduce"}
    assert all(c["inside"] for c in found)


def test_parameters_on_the_examples_axis_keep_their_place(results):
    """Gradients and updated parameters. On automatic axes `jit` does not know where its arguments lie."""
    explicit, automatic = results["spread Explicit"]["kept"], results["spread Auto"]["kept"]
    assert all(explicit)
    assert all(automatic[4:])  # 4 of two compiled calls come first


def test_the_documented_example_is_planned_for_all_devices(results):
    assert results["documented"]["planned"] == 64


def test_parameters_that_differ_along_the_axis_are_refused(results):
    assert results["differs"].startswith(
        "Parameters must be the same along axis_name. Received: parameters[0]['b']=shape"
    )
    assert "under jax.set_mesh(mesh)" in results["differs"]


def test_every_device_and_micro_batch_draws_its_own(results):
    assert results["dropout"] == 64


def test_words(results):
    assert results["refused"] == [
        "Each device takes the same part of a micro-batch. Received: micro_batch of 12 over 8 devices. "
        "Pass a multiple of 8; pad the batch, and give the padding no items.",
        "axis_name must be an axis of shard_map, vmap or pmap around the call, or of the mesh in scope. "
        "Received: axis_name=('no',) with a mesh of {'data': 8}. Call it under jax.set_mesh(mesh).",
    ]
