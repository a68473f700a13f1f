"""Help for testing mechanisms, for this library's own tests and for anyone who adds one."""

from coterie.testing.weights import generated_tensor, generated_weights

__all__ = ["generated_tensor", "generated_weights"]
