"""The training loop, the model and the data: transformers' TrainingArguments' names and meanings."""

from __future__ import annotations

from typing import Any

from megalign.config.base import config
from megalign.config.compute import ComputeConfig
from megalign.config.refused import MODEL_INIT, is_inert
from megalign.config.values import option
from megalign.errors import UserError

_INTERVALS = ("no", "steps", "epoch")
_LARGEST_SEED = 2**32 - 1  # numpy's
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@config
class LoopConfig(ComputeConfig):
    """Model, data, batch sizes, AdamW, schedule, logging, evaluation, checkpoints."""

    model_name_or_path: str | None = None
    """Hugging Face model directory (relative to the current directory) or hub name."""
    model_init_kwargs: dict[str, Any] | None = None
    """Arguments of from_pretrained, which TRL's scripts give: {"dtype": "bfloat16"} means bf16=True, float32
    nothing (AdamW's master weights always are); others pass where they ask for nothing."""
    disable_dropout: bool = option(
        True,
        choices=(True,),
        why="dropout would make logprobs of the same tokens differ by noise, so it is never applied",
    )
    """Models run without dropout. TRL's default is False for GRPO and RLOO."""
    router_aux_loss_coef: float | None = option(None, minimum=0)
    """Of a model with experts, what its load-balancing loss is multiplied by where it is added to the loss: the mean,
    over the layers with experts, of num_experts * sum over experts of (choices of it / tokens) * (its mean
    probability), over all tokens of a microbatch but pads, which count by their number. transformers'
    load_balancing_loss_func is this for one layer, and averages over layers before it multiplies. The same gradient
    has in Megatron a moe_aux_loss_coeff of this times num_experts_per_tok / the number of layers with experts. None
    and 0 are off, since with it a step depends on its microbatches; TRL's None takes the coefficient of the model's
    config."""
    dataset_name: str | list[str] | None = None
    """Rows to train on: a local .jsonl or .parquet file, a directory, or a hub name; several of them are one
    after another, or mixed as dataset_weights says."""
    dataset_weights: list[float] | None = option(None, above=0)
    """Probability with which the next row comes from each of several datasets (they need not sum to 1), until
    each has been read whole; one that ends sooner starts again."""
    dataset_config: str | None = None
    """Configuration of a hub dataset, or of a directory whose README.md lists several."""
    dataset_train_split: str = "train"
    """Split of dataset_name that is trained on."""
    streaming: bool = False
    """Read no more rows than max_steps (which it needs) takes, instead of the whole dataset."""
    skip_bad_rows: bool = False
    """Leave rows out that would be refused, instead of ending with the first of them: what the trainer cannot learn
    from, and lines of a .jsonl file (named by itself, not by its directory) that are no JSON. They are counted in one
    line, which names the first, and as skipped_rows in the first line of metrics. What has no rows to tell apart, such
    as a .parquet file that was cut, is refused all the same."""
    dataset_test_split: str = "test"
    """Split that is evaluated on, when eval_strategy or eval_on_start ask for it."""
    eval_dataset_name: str | None = None
    """Rows to evaluate on, where they are not a split of dataset_name: a file, a directory or a hub name."""
    output_dir: str = "trainer_output"
    """Where metrics.jsonl, checkpoints and the final model are written."""

    max_steps: int = option(-1, minimum=-1)
    """Optimizer steps to take; above 0 it overrides num_train_epochs."""
    num_train_epochs: float = option(3.0, above=0)
    """Passes over the training rows."""
    per_device_train_batch_size: int = option(8, minimum=1)
    """Dataset rows (of trainers that sample: completions) per data-parallel rank and microbatch; a device is a DP
    rank."""
    per_device_eval_batch_size: int = option(8, minimum=1)
    """The same for evaluation."""
    gradient_accumulation_steps: int = option(1, minimum=1)
    """Microbatches per optimizer step; with pipeline stages, more of them keep the pipeline fuller."""
    max_tokens_per_microbatch: int | None = option(None, minimum=1)
    """The rows of an optimizer step are dealt out by their lengths: microbatches of at most this many tokens (a longer
    row has one of its own), which cost every data-parallel rank as nearly the same as whole rows allow, attention's
    square included. per_device_train_batch_size x gradient_accumulation_steps still says how many rows a step has.
    perf/imbalance is the share of the ranks' time that is left waiting for the slowest. Evaluation, and KTO's pass
    over mismatched answers, keep to rows. Not given: microbatches of per_device_train_batch_size rows."""
    learning_rate: float = option(5e-5, minimum=0)
    """AdamW's peak learning rate."""
    lr_scheduler_type: str = option(
        "linear",
        choices=_SCHEDULES,
        why="schedules that follow a metric are not built, nearest is constant_with_warmup",
    )
    """Shape of the learning rate over the steps; transformers' own schedules."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further arguments of the schedule, e.g. {"min_lr": 1e-7} for cosine_with_min_lr."""
    warmup_steps: float = option(0.0, minimum=0)
    """Steps in which the learning rate rises from 0; below 1 it is a fraction of all steps."""
    weight_decay: float = option(0.0, minimum=0)
    """AdamW's decoupled weight decay; biases and norm weights are left out, as in transformers."""
    adam_beta1: float = option(0.9, minimum=0, below=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = option(0.999, minimum=0, below=1)
    """AdamW's decay of the second moment."""
    adam_epsilon: float = option(1e-8, minimum=0)
    """AdamW's epsilon."""
    max_grad_norm: float = option(1.0, minimum=0)
    """Gradients are clipped to this global norm; 0 does not clip."""
    max_skipped_steps: int = option(5, minimum=0)
    """A step whose loss or gradient is not finite on any rank is skipped on all: no weight and no optimizer state
    changes, learning rate and rows go on, and the log counts it (skipped_steps) and names its dataset rows. After more
    than this many in a row the run saves a checkpoint and ends with an error; 0 allows none. TRL goes on with NaN."""
    seed: int = option(42, minimum=0, maximum=_LARGEST_SEED)
    """Seed of initialisation, data order and sampling."""
    data_seed: int | None = option(None, minimum=0, maximum=_LARGEST_SEED)
    """Seed of the data order alone; seed when not given."""
    logging_strategy: str = option("steps", choices=_INTERVALS)
    """When metrics go to the progress display, the reporters and metrics.jsonl: no, steps or epoch."""
    logging_steps: float = option(10.0, above=0)
    """Steps between two logs; below 1 a fraction of all steps."""
    logging_first_step: bool = False
    """Also log step 1."""
    report_to: list[str] = option([])
    """Reporters of transformers that also receive the metrics: tensorboard, wandb, mlflow ...; none for
    none."""
    run_name: str | None = None
    """Name of the run for the reporters; output_dir when not given."""
    project: str = "huggingface"
    """Project of the run for the reporters that have projects (trackio)."""
    disable_tqdm: bool | None = None
    """Print log lines instead of a progress bar."""

    eval_strategy: str = option("no", choices=_INTERVALS)
    """When to evaluate: no, steps or epoch."""
    eval_steps: float | None = option(None, above=0)
    """Steps between two evaluations; below 1 a fraction of all steps; logging_steps when not given."""
    eval_delay: float = option(0.0, minimum=0)
    """Steps (or epochs, by eval_strategy) before the first evaluation."""
    eval_on_start: bool = False
    """Evaluate once before the first step."""

    save_strategy: str = option(
        "steps", choices=_INTERVALS, why="keeping the best one is not built yet, nearest is steps"
    )
    """When to write output_dir/checkpoint-{step}: no, steps or epoch."""
    save_steps: float = option(500.0, above=0)
    """Steps between two checkpoints; below 1 a fraction of all steps."""
    save_total_limit: int | None = option(None, minimum=1)
    """Keep only this many of the newest checkpoints; all when not given."""
    save_hf_steps: int | None = option(None, minimum=1)
    """Steps between two exports of the policy as a Hugging Face directory, output_dir/hf-{step}, which is whole when it
    is there; none when not given. Made by processes beside the ranks while training goes on, from host memory that
    holds the weights once more."""
    async_save: bool = False
    """Write checkpoints by a process beside each rank while training goes on; one is whole, and may be resumed from,
    when its manifest.json is there. Takes host memory for what is written, up to weights and optimizer once more."""
    resume_from_checkpoint: str | None = None
    """Checkpoint directory to go on from, or latest (in output_dir; starts afresh when there is none)."""
    ddp_timeout: int = option(1800, minimum=1, maximum=365 * 24 * 3600)
    """Seconds that a rank may wait for the others in a collective, or stand still otherwise, while it trains; then the
    job ends, and every rank's stack is in output_dir/stacks/."""

    def __post_init__(self) -> None:
        if self.report_to is None or self.report_to in ("none", ["none"]):
            self.report_to = []
        # transformers takes booleans here; the command line makes text of them.
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = "latest" if str(self.resume_from_checkpoint).lower() == "true" else None
        super().__post_init__()

    def check_values(self) -> None:
        """Also fills eval_steps in, as transformers does, and reads model_init_kwargs."""
        super().check_values()
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        for name, value in (self.model_init_kwargs or {}).items():
            if name in ("dtype", "torch_dtype"):
                self.model_init_kwargs[name] = self._take_dtype(name, value)
            elif name not in MODEL_INIT:
                raise UserError(f"model_init_kwargs has {name!r}, which is not read here; only dtype is")
            elif not is_inert(MODEL_INIT[name], value):
                raise UserError(f"model_init_kwargs={{{name!r}: {value!r}}} is refused: {MODEL_INIT[name]}")

    def _take_dtype(self, name: str, value: Any) -> str | None:
        """The dtype's name; bfloat16 is what bf16=True means."""
        dtype = None if value is None else str(value).removeprefix("torch.")
        if dtype == "bfloat16" and self.bf16 is None:
            self.bf16 = True
        if dtype not in (None, "float32", "bfloat16") or (dtype == "bfloat16" and not self.bf16):
            raise UserError(
                f"model_init_kwargs={{{name!r}: {dtype!r}}} with bf16={self.bf16}: models are in bfloat16 (bf16=True) "
                "or float32; give one of them"
            )
        return dtype

    @property
    def engines_sleep(self) -> bool:
        """Whether engines hand their memory over between phases; only jobs that also generate do."""
        return False

    @property
    def data_order_seed(self) -> int:
        """The seed of the samplers."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def evaluates(self) -> bool:
        """Whether training will ask for an evaluation dataset."""
        return self.eval_strategy != "no" or self.eval_on_start

    def validate(self, world_size: int) -> None:
        """Step intervals: whole numbers, or fractions of the run below 1; no field that nothing would read."""
        super().validate(world_size)
        if self.eval_dataset_name is not None and not self.evaluates:
            raise UserError(
                f"eval_dataset_name={self.eval_dataset_name!r} is given and nothing evaluates; set eval_strategy "
                "(steps or epoch) or eval_on_start, or drop it"
            )
        self._validate_datasets()
        if not self.output_dir.strip():
            raise UserError(f"output_dir={self.output_dir!r} names no directory; give one, e.g. output_dir=run")
        if self.max_steps == 0:
            raise UserError("max_steps=0 leaves nothing to train; give a number above 0, or -1 for num_train_epochs")
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value > 1 and value != int(value):
                raise UserError(f"{name}={value} must be a whole number, or below 1 for a fraction; give {int(value)}")

    def _validate_datasets(self) -> None:
        names = [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name
        if names == []:
            raise UserError("dataset_name=[] names no dataset; give one or more")
        weights = self.dataset_weights
        if weights is not None and len(weights) != len(names or []):
            raise UserError(
                f"dataset_weights has {len(weights)} values for {len(names or [])} datasets in dataset_name; give one "
                "for each"
            )
        if self.streaming and self.max_steps < 1:
            raise UserError(
                "streaming=True needs max_steps, since a stream does not say how many rows an epoch has; give "
                "max_steps above 0"
            )
