"""The recipes that people paste, run as the page prints them: each is wrong where the page says, and ours is right."""

from pathlib import Path

import pytest

from documentation import run_blocks

PAGE = Path(__file__).parent.parent.parent / "docs/recipes-tf1.md"


def test_what_each_recipe_gets_wrong(capsys):
    namespace = {"__name__": "__main__"}
    assert run_blocks(PAGE, namespace) == 8
    wrong, right = namespace["wrong"], namespace["right"]
    assert max(right.values()) < 1e-14
    assert wrong.pop("the same, both ops fetched together", 0.51) == pytest.approx(0.51, abs=0.01)  # a race: see `lost`
    assert {recipe: round(off, 2) for recipe, off in wrong.items()} == {
        "three ops with a sum": 4.67,
        "three ops with a counted mean": 0.44,
        "the same, dividing what assign_add returns": 1.0,
        "gradients fed as variables": 0.44,
        "one conditional op": 0.59,
    }
    printed = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    text = PAGE.read_text()
    for recipe, off in {**wrong, **right}.items():
        assert printed[recipe] == f"{off:.1e}"
        row = next(line for line in text.splitlines() if line.replace("`", "").startswith(f"| {recipe} | "))
        assert float(row.split(" | ")[1].strip(" |")) == pytest.approx(off, rel=0.05 if off > 1e-9 else 10)


def test_the_last_micro_batch_is_counted_twice():
    """Five micro-batches of gradient 2: a mean of 10/5, and 12/5 where the division takes what assign_add returns."""
    import tensorflow as tf

    import bigbatch.tf1 as bb

    v1 = tf.compat.v1

    def train(recipe):
        with tf.Graph().as_default():
            x, w = v1.placeholder(tf.float64, []), v1.get_variable("w", initializer=tf.constant(0.0, tf.float64))
            loss, optimizer = x * w, v1.train.GradientDescentOptimizer(1.0)
            if recipe:
                total, count = (v1.get_variable(n, initializer=tf.constant(0.0, tf.float64)) for n in ("sum", "count"))
                ((gradient, _),) = optimizer.compute_gradients(loss, [w])
                added = total.assign_add(gradient)
                add, apply = tf.group(added, count.assign_add(1)), optimizer.apply_gradients([(added / count, w)])
            else:
                acc = bb.Accumulator(optimizer, every=8)
                add = acc.minimize(loss, items=1)
                apply = acc.apply
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                for _ in range(5):
                    session.run(add, {x: 2.0})
                session.run(apply, {x: 2.0} if recipe else None)
                return -session.run(w)

    assert train(recipe=True) == 12 / 5
    assert train(recipe=False) == 10 / 5
