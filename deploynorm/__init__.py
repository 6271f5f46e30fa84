"""deploynorm."""
