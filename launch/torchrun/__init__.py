"""A deployment whose processes torchrun, or another launcher that sets its variables, has started."""
