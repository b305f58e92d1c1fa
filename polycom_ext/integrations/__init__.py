"""One adapter for each upstream; none imports another."""
