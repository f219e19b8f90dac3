"""The laws run with gradients that wait as products, and without: that they do."""

from bigbatch.fused import tensorflow_split
from bigbatch.fused.tensorflow import DeferredSum
from conformance import jobs
from conformance.adapters import tensorflow as adapters
from conformance.jobs import Spec
from conformance.wide import WIDTH


def test_the_wide_adapter_has_products_and_the_other_has_none(monkeypatch):
    seen, look = [], tensorflow_split.factored_grad

    def noting(gradient):
        product = look(gradient)
        seen.extend([] if product is None else [product.shape])
        return product

    monkeypatch.setattr(tensorflow_split, "factored_grad", noting)
    for job, products in (("net", 2), ("mean", 1)):
        for run, expected in ((adapters.Split, 0), (adapters.SplitProducts, products)):
            seen.clear()
            run(Spec(job, jobs.params(job))).window(jobs.window(job, (4, 4, 2), seed=0))
            assert len(seen) >= expected, (job, run)
            assert set(seen) <= {(WIDTH, WIDTH)} if expected else not seen


def test_the_streams_have_them_too():
    for run, expected in ((adapters.Stream, 0), (adapters.StreamProducts, 2)):
        acc = run(Spec("net", jobs.params("net"))).acc
        assert sum(isinstance(one, DeferredSum) for one in acc._sums) == expected
