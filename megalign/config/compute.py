"""What computes, in which precision, and what is kept of the forward pass: Megatron-Core's names and meanings."""

from __future__ import annotations

from megalign.config.base import Config, config
from megalign.config.values import option
from megalign.errors import UserError

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj")
_DELAYED = "delayed"


@config
class ComputeConfig(Config):
    """Layers, precision, recomputation and offloading."""

    transformer_impl: str = option("auto", choices=("auto", "transformer_engine", "local"))
    """Modules of the layers: transformer_engine (NVIDIA's fused ones), local (plain torch), or auto: the former where
    it is installed, there is a GPU, and it has what the model needs (it has no sinks, caps on scores, windows that
    differ by layer, or norms behind attention). The run's line that begins `megalign: layers:` says which, and why."""
    bf16: bool | None = None
    """Weights and activations in bfloat16 with fp32 master weights and fp32 gradients; False is fp32
    throughout. Not given: True on CUDA, False on CPU. (TRL's True keeps fp32 weights under autocast: twice
    the memory.)"""
    fp8: str | None = option(None, choices=("e4m3", "hybrid"))
    """Matrix products of the layers in FP8: e4m3, or hybrid (gradients in e5m2). Needs Transformer Engine and bf16;
    weights, head, logprobs and AdamW stay as they are."""
    fp8_recipe: str | None = option(None, choices=(_DELAYED, "tensorwise", "blockwise", "mxfp8"))
    """How FP8 numbers are scaled: delayed (by the maxima of earlier steps; also when not given), tensorwise,
    blockwise (Hopper on) or mxfp8 (Blackwell on)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them: less memory, more arithmetic.
    recompute_granularity says which."""
    recompute_granularity: str | None = option(None, choices=("full", "selective"))
    """What gradient_checkpointing recomputes: selective (parts of each layer, by recompute_modules; also when not
    given) or full (whole layers, by recompute_method)."""
    recompute_modules: list[str] | None = option(None, choices=RECOMPUTE_MODULES)
    """What selective recomputes: core_attn (when not given), layernorm, mlp, moe, moe_act, shared_experts,
    mla_up_proj."""
    recompute_method: str | None = option(None, choices=("uniform", "block"))
    """What full recomputes: uniform (every layer, in units of recompute_num_layers; also when not given) or block
    (the first recompute_num_layers of each stage, chunks of a stage apart)."""
    recompute_num_layers: int | None = option(None, minimum=1)
    """Layers of a unit (uniform; 1 when not given) or of a stage's recomputed part (block)."""
    share_prefixes: bool = True
    """Neighbouring sequences of a microbatch that begin with the same 16 tokens or more (completions of a prompt, the
    two of a preference pair) have them computed once; the numbers stay. Not with context parallelism, Transformer
    Engine's layers, latent attention, LongRoPE or router_aux_loss_coef."""
    torch_compile: bool = True
    """On a GPU, in bf16, what plain layers do to activations between matrix products (norms, rotations, SwiGLU) is
    compiled, once a run: seconds at its first step, a pass over memory each afterwards. Needs a C compiler on the node.
    A CPU has csrc/ for it. TRL's True compiles the whole model; its default is False."""
    activation_offloading: bool = False
    """Activations that the backward pass needs wait in host memory: less device memory, slower steps."""

    @property
    def params_dtype_name(self) -> str:
        """The dtype of weights and activations: "bfloat16" or "float32"."""
        if self.bf16 is None:
            # Imported here: --help and a wrong flag must answer without torch.
            from megalign.device import on_cuda

            return "bfloat16" if on_cuda() else "float32"
        return "bfloat16" if self.bf16 else "float32"

    @property
    def fp8_scaling(self) -> str:
        """fp8_recipe, or what stands for it."""
        return self.fp8_recipe or _DELAYED

    @property
    def token_unit(self) -> int:
        """The tokens that a rank computes on are a multiple of this, as FP8 products need it."""
        if self.fp8 is None:
            return 1
        return 32 if self.fp8_scaling == "mxfp8" else 16

    @property
    def head_in_fp32(self) -> bool:
        """Whether the language model's head is fp32 in a bf16 model."""
        return False

    def validate(self, world_size: int) -> None:
        """What contradicts or has no effect."""
        super().validate(world_size)
        if self.fp8_recipe is not None and self.fp8 is None:
            raise UserError(
                f"fp8_recipe={self.fp8_recipe!r} scales FP8 numbers, and fp8 is not set; set fp8='hybrid', or drop it"
            )
        if self.fp8 is not None and self.bf16 is False:
            raise UserError(
                f"fp8={self.fp8!r} is FP8 within a bfloat16 model, and bf16=False makes it fp32; set bf16=True, or "
                "drop fp8"
            )
        self._validate_recomputation()

    def _validate_recomputation(self) -> None:
        for name in ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers"):
            if getattr(self, name) is not None and not self.gradient_checkpointing:
                raise UserError(
                    f"{name}={getattr(self, name)!r} contradicts gradient_checkpointing=False; drop one of them"
                )
        full = self.recompute_granularity == "full"
        for name in ("recompute_modules",) if full else ("recompute_method", "recompute_num_layers"):
            if getattr(self, name) is not None:
                kinds = ("full", "selective") if full else ("selective", "full")
                raise UserError(
                    f"{name}={getattr(self, name)!r} has no effect on {kinds[0]} recomputation; set "
                    f"recompute_granularity={kinds[1]!r}, or drop it"
                )
        if self.recompute_modules == []:
            raise UserError(
                "recompute_modules=[] recomputes nothing; name some, or say it with gradient_checkpointing=False"
            )
        if self.recompute_method == "block" and self.recompute_num_layers is None:
            raise UserError(
                "recompute_method='block' does not say how many layers of a stage are recomputed; set "
                "recompute_num_layers"
            )
