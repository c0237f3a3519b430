"""What the configs of trainers that sample share: rewards, rounds of sampling, tables of completions."""

from __future__ import annotations

from megalign.config.base import config
from megalign.config.loop import LoopConfig
from megalign.config.parallel import ParallelConfig
from megalign.config.rollout import RolloutConfig
from megalign.config.values import option
from megalign.errors import UserError


@config
class OnlineConfig(LoopConfig, ParallelConfig, RolloutConfig):
    """Learning from sampled completions; a round is one sampling and the optimizer steps that it feeds."""

    reward_funcs: list[str] | None = None
    """Rewards: built-in names, dotted paths (my.module.func), files (path/to/file.py:func), or directories of
    reward models (*ForSequenceClassification). In Python, functions may be given to the trainer instead."""
    reward_weights: list[float] | None = None
    """Weight of each reward; 1 each when not given."""
    reward_timeout: float = option(600.0, above=0)
    """Seconds that the reward functions may take for one round of sampling before the job stops with an
    error."""
    overlong_buffer_length: int | None = option(None, minimum=1)
    """Tokens before max_completion_length over which a penalty on the reward grows to overlong_penalty (DAPO,
    arXiv 2503.14476 eq. 13); none when not given."""
    overlong_penalty: float = option(1.0, above=0)
    """What is taken off the reward of a completion of max_completion_length tokens; see
    overlong_buffer_length."""
    shuffle_dataset: bool = True
    """Prompts in a new random order each epoch; False takes them in order."""
    num_generations: int = option(1, minimum=1)
    """Completions per prompt."""
    num_generations_eval: int | None = option(None, minimum=1)
    """Completions per prompt in evaluation; num_generations when not given."""
    log_completions: bool = False
    """Print sampled completions and write them to output_dir/completions at each log."""
    num_completions_to_print: int | None = option(None, minimum=1)
    """Completions to print; all when not given."""
    log_unique_prompts: bool = False
    """One completion per prompt in what log_completions prints and writes."""

    @property
    def reward_sources(self) -> list[str]:
        """The rewards that the config names, in the order of reward_weights."""
        return self.reward_funcs or []

    @property
    def eval_generations(self) -> int:
        """Completions per prompt in evaluation."""
        return self.num_generations_eval or self.num_generations

    @property
    def engines_sleep(self) -> bool:
        """vllm_enable_sleep_mode speaks for both sides of the colocation: each engine is awake for its own
        pass only."""
        return self.vllm_enable_sleep_mode

    @property
    def passes_per_round(self) -> int:
        """How often the optimizer goes over the completions of a round."""
        raise NotImplementedError

    def microbatches_per_generation(self, data_parallel_size: int) -> int:
        """Microbatches that one round of sampling feeds each DP rank, in one pass."""
        raise NotImplementedError

    def completions_per_generation(self, data_parallel_size: int) -> int:
        """Completions of one round of sampling, over the whole job."""
        microbatches = self.microbatches_per_generation(data_parallel_size)
        return self.per_device_train_batch_size * data_parallel_size * microbatches

    def validate(self, world_size: int) -> None:
        """Time-outs and lengths; rounds and evaluation batches of whole groups; a weight for each reward."""
        super().validate(world_size)
        if self.reward_timeout >= self.ddp_timeout:
            raise UserError(
                f"reward_timeout {self.reward_timeout:g} s must be below ddp_timeout {self.ddp_timeout} s, after which "
                "the ranks that wait for the rewards give the job up; raise ddp_timeout or lower reward_timeout"
            )
        several = world_size > self.vllm_tensor_parallel_size  # replicas, which wait for one another
        if several and self.vllm_timeout is not None and self.vllm_timeout >= self.ddp_timeout:
            raise UserError(
                f"vllm_timeout {self.vllm_timeout:g} s must be below ddp_timeout {self.ddp_timeout} s, after which the "
                "replicas that have sampled give up those that have not; raise ddp_timeout or lower vllm_timeout"
            )
        if self.overlong_buffer_length is not None and self.overlong_buffer_length > self.max_completion_length:
            raise UserError(
                f"overlong_buffer_length {self.overlong_buffer_length} must be at most max_completion_length "
                f"{self.max_completion_length}; lower the first or raise the second"
            )
        replicas = self.data_parallel_size(world_size)
        self._validate_round(replicas)
        rows = self.per_device_eval_batch_size * replicas
        if self.evaluates and rows % self.eval_generations:
            raise UserError(
                f"per_device_eval_batch_size {self.per_device_eval_batch_size} * data-parallel ranks {replicas} = "
                f"{rows} must be a multiple of num_generations_eval {self.eval_generations}; change one of them"
            )
        sources = self.reward_sources
        if sources and self.reward_weights and len(sources) != len(self.reward_weights):
            raise UserError(
                f"reward_weights has {len(self.reward_weights)} values for {len(sources)} rewards; give one for each"
            )

    def _validate_round(self, replicas: int) -> None:
        completions = self.completions_per_generation(replicas)
        if completions % self.num_generations:
            raise UserError(
                f"generation_batch_size {completions} (a round of sampling: per_device_train_batch_size "
                f"{self.per_device_train_batch_size} * data-parallel ranks {replicas} * microbatches "
                f"{self.microbatches_per_generation(replicas)}) must be a multiple of num_generations "
                f"{self.num_generations}; change one of them"
            )
