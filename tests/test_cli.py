"""The command line, without a framework."""

import subprocess
import sys

import pytest

from bigbatch import __version__, cli


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"bigbatch {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["demo", "--framework", "mxnet"], "invalid choice: 'mxnet'"),
        (["demo", "--epochs", "0"], "must be at least 1. Received: 0"),
        (["demo", "--epochs", "many"], "argument --epochs: invalid"),
    ],
)
def test_what_it_does_not_understand(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["figure.txt", "no/such/folder/figure.png"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(output, capsys):
    assert cli.main(["demo", "--output", output]) == 1
    assert f"Received: {output}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ({"rich"}, [], "The demo needs rich. Run: pip install 'bigbatch[demo]'"),
        ({"torch"}, ["--framework", "torch"], "torch is not installed. Run: pip install 'bigbatch[torch]'"),
        (
            {"tensorflow"},
            ["--framework", "tf1"],
            "tensorflow is not installed. Run: pip install 'bigbatch[tensorflow]'",
        ),
        ({package for package, _ in cli.FRAMEWORKS.values()}, [], "Run: pip install 'bigbatch[torch]'"),
    ],
)
def test_what_is_not_installed_is_named_with_its_remedy(missing, arguments, message, capsys, monkeypatch):
    found = cli._installed
    monkeypatch.setattr(cli, "_installed", lambda package: package not in missing and found(package))
    assert cli.main(["demo", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("package", "missing", "extra"),
    [
        ("torch", "torch", "torch"),
        ("jax", "jax", "jax"),
        ("jax", "optax", "jax"),
        ("keras", "keras", "keras"),
        ("tensorflow", "tensorflow", "tensorflow"),
        ("tf1", "tensorflow", "tensorflow"),
    ],
)
def test_a_package_without_its_framework_names_the_extra(package, missing, extra):
    code = f"import sys; sys.modules[{missing!r}] = None; import bigbatch.{package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"bigbatch.{package} needs {missing}, which is not installed. Run: pip install 'bigbatch[{extra}]'"
    assert done.stderr.splitlines()[-1] == f"ImportError: {said}"
