"""Whole networks."""

from gradfn.nets.mlp import hidden_width, mlp

__all__ = ["hidden_width", "mlp"]
