"""Text in, token files out: `prepare` for Megatron-LM and OLMo, and a public-domain corpus to try it on."""
