"""Products of a batch as matrix products: what makes code that is written for one example fast."""

from gradfn.flatten._batch_mean import BatchMean, ExampleLoss, Loss, batch_mean, loss_of_example
from gradfn.flatten.products import flat_products

__all__ = ["BatchMean", "ExampleLoss", "Loss", "batch_mean", "flat_products", "loss_of_example"]
