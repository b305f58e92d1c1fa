"""Which of Megatron's options make another model of a checkpoint.

Those that upstream builds a model from, but for the ones known to leave the function of a trained model as it
is.

An option that a later Megatron adds to its configuration counts until it is known, since a run that resumes
as another function goes on without a word.
"""

from __future__ import annotations

from typing import Any

from polycom_ext.integrations.megatron.options import Option

HARMLESS = {
    "another kernel for the same formula": (
        "attention-backend batch-invariant-mode disable-mamba-mem-eff-path fused-residual-rmsnorm "
        "mla-down-proj-fusion moe-grouped-gemm moe-permute-fusion moe-permute-fusion-into-hybridep "
        "moe-router-fusion no-bias-dropout-fusion no-bias-gelu-fusion no-bias-swiglu-fusion "
        "no-clone-scatter-output-in-embedding no-masked-softmax-fusion no-persist-layer-norm no-rope-fusion "
        "symmetric-ar-type transformer-impl use-fused-weighted-squared-relu use-te-activation-func"
    ),
    "memory for time: what is kept, recomputed, moved or replayed": (
        "cuda-graph-impl cuda-graph-scope cuda-graph-warmup-steps distribute-saved-activations "
        "enable-cuda-graph external-cuda-graph fine-grained-activation-offloading min-offloaded-tensor-size "
        "moe-layer-recompute offload-modules recompute-granularity recompute-method recompute-modules "
        "recompute-num-layers"
    ),
    "which rank does what": (
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split cp-comm-type "
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers moe-deepep-num-sms "
        "moe-enable-deepep moe-flex-dispatcher-backend moe-hybridep-num-blocks-permute "
        "moe-hybridep-num-blocks-unpermute moe-hybridep-num-sms moe-pad-expert-input-to-capacity "
        "moe-shared-expert-overlap moe-token-dispatcher-type pipeline-model-parallel-layout"
    ),
    "how finely it is rounded, as with bf16": (
        "apply-query-key-layer-scaling attention-softmax-in-fp32 disable-bf16-reduced-precision-matmul "
        "first-last-layers-bf16 fp32-residual-connection fp4-format fp4-param-gather fp4-quantizer-factory "
        "fp4-recipe fp8-amax-compute-algo fp8-amax-history-len fp8-format fp8-interval fp8-margin "
        "fp8-param-gather fp8-quantizer-factory fp8-recipe moe-router-dtype moe-router-padding-for-fp8 "
        "moe-router-padding-for-quantization no-fp8-wgrad num-layers-at-end-in-bf16 "
        "num-layers-at-start-in-bf16 te-precision-config-file"
    ),
    "before the first step only": (
        "embedding-init-method-std init-method-std init-method-xavier-uniform init-model-with-meta-device "
        "moe-use-upcycling seed"
    ),
    "how it is trained, as the learning rate is: dropout, noise, what the loss weighs and what is clipped": (
        "attention-dropout calculate-per-token-loss dsa-indexer-loss-coeff dsa-indexer-use-sparse-loss "
        "hidden-dropout moe-aux-loss-coeff moe-grouped-experts-in-norm moe-input-jitter-eps "
        "moe-router-bias-update-rate moe-z-loss-coeff mtp-loss-scaling-factor qk-clip qk-clip-alpha "
        "qk-clip-threshold"
    ),
    "what is logged, checked or trusted": (
        "config-logger-dir log-max-attention-logit moe-per-layer-logging test-mode trust-remote-code"
    ),
    "generation only": (
        "cache-mla-latents flash-decode inference-disable-triton-nvls-kernels "
        "inference-fuse-tp-communication inference-grouped-gemm-backend "
        "inference-moe-disable-fused-quant-kernels inference-rng-tracker mlp-chunks-for-prefill "
        "moe-enable-routing-replay moe-pad-experts-for-cuda-graph-inference nccl-all-reduce-for-prefill"
    ),
}
"""Why -> options that no trained model's function hangs on."""
ELSEWHERE = ("spec",)
"""Options that choose the model beside its configuration."""


def fixed(options: dict[str, Any], known: dict[str, Option]) -> dict[str, Any]:
    """Option -> value, of those that fix the model and differ from upstream's default.

    Another name for the same thing, another way to write its value and a default that is spelled out are no
    difference.
    """
    harmless = {known[name].dest for names in HARMLESS.values() for name in names.split() if name in known}
    titles = {known[name].dest: name for name in reversed(known)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        option = known.get(name)
        if option is None or option.dest in harmless or not (option.of_model or name in ELSEWHERE):
            continue
        effect = option.effect(value)
        if effect != option.default:
            values[titles[option.dest]] = effect
    return values
