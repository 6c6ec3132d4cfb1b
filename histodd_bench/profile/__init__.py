"""How fast the operators and the distillation step are here, beside what else computes the same: ``profile``.

:mod:`~histodd_bench.profile.problems` says what is computed and by which backends, :mod:`~histodd_bench.profile.peers`
holds the plain PyTorch rewrites and the public packages, :mod:`~histodd_bench.profile.measure` the clock,
:mod:`~histodd_bench.profile.step` the distillation step, :mod:`~histodd_bench.profile.run` makes the record and
:mod:`~histodd_bench.profile.report` shows it. ``benchmarks/`` times the same problems with pytest-benchmark.
"""
