"""Checks in real processes, with random weights and in float64, that the parallelized model gives the answers of the model itself.

In float64 only the order of sums differs, so a relative error

    |a - b|_inf / |b|_inf   (`relative_error`)

above `TOLERANCE` is a bug, not noise. Every rank builds the same model twice, parallelizes one (`worker`), and compares outputs,
gradients of every parameter and greedily generated tokens. Whole outputs of all modules are kept on both sides, so the report can
name the first module that differs (`autotp.testing.equivalence.module_calls`).
"""

from __future__ import annotations

from autotp.numeric.exact import TOLERANCE, relative_error
from autotp.verify.main import verify
from autotp.verify.report import Check, Report

__all__ = ["TOLERANCE", "Check", "Report", "relative_error", "verify"]
