"""Compute every so many steps, and predict in between by a polynomial through what was computed.

Paper: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923.
"""

from __future__ import annotations

from pydantic import Field

from optpass.passes.cache.policies import Polynomial, PolynomialOptions


class TaylorSeerOptions(PolynomialOptions):
    """Options of ``taylorseer``."""

    order: int = Field(2, ge=0, le=4, description="degree of the polynomial that predicts features; 0 is a copy")


class TaylorSeer(Polynomial):
    """A uniform schedule with a polynomial in between."""

    name = "taylorseer"
    options_type = TaylorSeerOptions
