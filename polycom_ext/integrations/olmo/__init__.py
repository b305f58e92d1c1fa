"""OLMo (ai2-olmo 0.6.0, and the MoE branch at 04a2da53): what the patches call, and a training entry.

`activation.build_activation` makes a block's activation, `moe.OLMoEBlock` is the MoE block of 0.6.0,
`router.RouterLosses` its auxiliary losses, `megablocks.share_activation` fits an activation to the branch's
experts; `train` trains with either.
"""
