"""Our optimizers in other packages."""

from llc_fast.compat import devinterp2

__all__ = ["devinterp2"]
