"""Text in, token files out: `prepare` for every trainer, and a public-domain corpus to try it on."""
