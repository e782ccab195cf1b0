"""Products of a batch as matrix products: what makes code that is written for one example fast."""

from gradfn.flatten.products import flat_products

__all__ = ["flat_products"]
