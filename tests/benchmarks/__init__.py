"""Benchmarks, run by hand: ``python -m tests.benchmarks speed`` and ``... quality``.

Speed is measured as ratios within one run; quality as a table of methods on one model.
"""
