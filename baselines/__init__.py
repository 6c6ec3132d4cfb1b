"""Coreset methods, one per file: they select real patches. Installed as ``histodd_bench.baselines``."""
