"""The examples of Accelerate, Lightning, Transformers and TRL, as their first lines say."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize("name", ["accelerate_accumulate", "lightning_accumulate"])
def test_it_learns(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\S+) over \d+ tokens", capsys.readouterr().out)]
    assert len(losses) == 8
    assert losses[-1] < 0.1 < 1 < losses[0]


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft"])
def test_hugging_faces_learn(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"^epoch .* loss (\S+) ", capsys.readouterr().out, re.M)]
    assert len(losses) >= 8
    assert losses[-1] < 0.5 < 2 < losses[0]
