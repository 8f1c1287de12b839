"""The settings of the model and of `train`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import SettingsConfigDict

from app.settings.types import (
    AutoOrBool,
    Beta,
    Count,
    Group,
    Location,
    Number,
    RunName,
    count_or,
    parse_branch,
    parse_compile,
    parse_init_from,
    parse_pair,
)


class ModelSettings(Group):
    """The GPT; the defaults are GPT-2 124M."""

    model_config = SettingsConfigDict(env_prefix="MODEL_", protected_namespaces=())

    architecture: Literal["gpt2", "qwen3"] = "gpt2"
    """gpt2; or qwen3: rotary positions, normalized queries and keys, SwiGLU, no biases"""
    context_length: Count = Field(1024, ge=2, le=65536)
    """tokens in a sequence (T)"""
    vocab_size: Count = Field(50257, ge=50257, le=50257)
    """rows of the embedding: the tokens of GPT-2's BPE"""
    num_layers: Count = Field(12, ge=1, le=10_000)
    """transformer blocks; auto: by the size of the text"""
    embd_size: Count = Field(768, ge=1)
    """width of the residual stream; auto: by the size of the text"""
    num_heads: Count = Field(12, ge=1)
    """attention heads; must divide the width, unless MODEL_HEAD_DIM is set; auto: of at
    least 64 channels"""
    head_dim: Annotated[int | Literal["auto"], count_or("auto", at_most=65536)] = "auto"
    """size of each head in qwen3; auto: width / heads, as always in gpt2"""
    tie_embeddings: AutoOrBool = "auto"
    """whether the output layer is the embedding; auto: true for gpt2, false for qwen3"""
    activation: Literal["gelu", "gelu_new"] = "gelu"
    """GELU of gpt2: gelu is exact; gelu_new is the tanh approximation, as in OpenAI's GPT-2"""

    def shape(self) -> dict[str, Any]:
        """Return what checkpoints record: the architecture, and its config's fields, none auto."""
        head_dim = self.embd_size // self.num_heads if self.head_dim == "auto" else self.head_dim
        of_qwen3 = {"head_dim": head_dim, "tie_embeddings": self.tie_embeddings == "true"}
        fixed = self.model_dump(exclude={*of_qwen3, "activation"})
        # Only where it is not the one that GPT-2s had before there was a choice.
        of_gpt2 = {"activation": self.activation} if self.activation != "gelu" else {}
        return fixed | (of_qwen3 if self.architecture == "qwen3" else of_gpt2)


class TrainSettings(Group):
    """From token shards to a trained GPT."""

    model_config = SettingsConfigDict(env_prefix="TRAIN_")

    dataset_dir: Location | None = None
    """dataset folder, below DATA_DIR; by default the one that prepare writes"""
    run_name: RunName | None = None
    """the run's folder below DATA_DIR/runs; by default the dataset folder's name"""
    branch_from: Annotated[str | None, BeforeValidator(parse_branch)] = None
    """checkpoint of another run with which this run begins, RUN or RUN@STEP; without a step the
    last one from before the cool-down"""
    init_from: Annotated[str | None, BeforeValidator(parse_init_from)] = None
    """where a new run takes its weights and its model's settings from: a model of the Hub, such as
    openai-community/gpt2; a folder that transformers or export has written; RUN or RUN@STEP"""
    tokens_per_step: Count = Field(524_288, gt=0, lt=2**31)
    """tokens per optimizer step, over all processes; auto: by the size of the text"""
    micro_batch_size: Annotated[int | Literal["auto"], count_or("auto")] = "auto"
    """sequences per forward pass on each process; auto: the largest that fits in memory and still
    helps"""
    max_steps: Count = Field(38, gt=0)
    """optimizer steps of the whole run; auto: some epochs, by the size of the text"""
    max_hours: Number | None = Field(None, gt=0, le=1e6)
    """hours that the whole run may take; the number of steps, at most TRAIN_MAX_STEPS, and the
    schedule of the learning rate are fitted to the measured speed"""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the blocks' matrices, AdamW for the rest; adamw: AdamW for all"""
    shard_optimizer: bool = False
    """divide the optimizer state among the processes, for models whose state is too large for one
    GPU"""
    learning_rate: Number = Field(3.6e-3, gt=0, le=1)
    """peak learning rate"""
    embedding_learning_rate: Number | None = Field(None, gt=0, le=1)
    """peak learning rate of the embeddings and the output layer; by default the same"""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(parse_pair)] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and mean square"""
    muon_split: bool = False
    """whether Muon makes matrices that are stored as one orthogonal each on its own: q, k and v,
    and the two inputs of SwiGLU"""
    momentum_warmup_steps: Count = Field(0, ge=0)
    """steps in which Muon's momentum rises from 0.85 to 0.95; 0: constant 0.95"""
    zero_init: bool = False
    """initialize the blocks' output projections, and an untied output layer, to zero"""
    lr_schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """learning rate after the warm-up: constant, a decay, or wsd: constant, then linear over the
    cool-down"""
    cooldown: Number = Field(0.5, ge=0, le=1)
    """fraction of the steps, at the end, over which the schedule wsd decays"""
    warmup_steps: Annotated[int | Literal["auto"], count_or("auto", at_least=0)] = "auto"
    """steps of linear warm-up; auto: a hundredth of the run"""
    min_lr_ratio: Number = Field(0.1, ge=0, le=1)
    """learning rate after the decay, as a fraction of the peak"""
    weight_decay: Number = Field(0.1, ge=0, le=1)
    """decoupled weight decay"""
    weight_decay_on: Literal["blocks", "matrices", "all"] = "matrices"
    """blocks: decay of the blocks' matrices only; matrices: of the embeddings as well; all: of
    every tensor, also biases and layer norms"""
    grad_clip: Number = Field(1.0, ge=0)
    """largest gradient norm; 0: no clipping"""
    shuffle: bool = True
    """visit the sequences in random order, another one in each epoch"""
    seed: Count = Field(0, ge=0, lt=2**32)
    """random seed of the initial weights and of the data order"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda with an NVIDIA GPU, mps on a Mac with Apple silicon, else cpu"""
    precision: Literal["auto", "bf16", "fp16", "float32", "fp8"] = "auto"
    """auto: bf16 autocast where that is faster, else float32; on NVIDIA GPUs before Ampere fp16,
    with loss scaling; fp8: bf16, with the output layer in 8-bit floats on GPUs that support them"""
    residual: Literal["bf16", "float32"] = "bf16"
    """dtype of the residual stream when training in bf16 or fp16: bf16 (fp16 in fp16) is faster and
    takes less memory, float32 is the original's"""
    compile: Annotated[bool, BeforeValidator(parse_compile)] = True
    """compile the model; false: start sooner, but train more slowly"""
    recompute: AutoOrBool = "auto"
    """compute the blocks' activations again in the backward pass, which saves memory and takes
    about a third longer; auto: only where a micro-batch of 1 would not fit otherwise"""
    deterministic: AutoOrBool = "auto"
    """bit-identical results from run to run; auto: on a CPU only"""
    val_every: Count = Field(250, ge=0)
    """steps between held-out losses, also at the end; 0: never; auto: a tenth of the run"""
    val_tokens: Count = Field(1_048_576, gt=0)
    """held-out tokens that each held-out loss is measured on"""
    hellaswag_every: Count = Field(0, ge=0)
    """steps between scores on HellaSwag, also at the end; 0: never"""
    hellaswag_file: Location | None = None
    """other questions of HellaSwag's form, below DATA_DIR; by default the 10,042 published ones,
    which are downloaded"""
    sample_every: Count = Field(250, ge=0)
    """steps between text samples, also at the end; 0: never; auto: a tenth of the run"""
    checkpoint_every: Count = Field(250, ge=0)
    """steps between checkpoints, also at the end; 0: only at the end; auto: a tenth of the run"""
    keep_checkpoints: Count = Field(2, ge=1)
    """latest checkpoints to keep, besides the best and the one from before the cool-down"""
    use_best: bool | None = None
    """whether sample, evaluate, export and load use the checkpoint with the lowest held-out loss,
    not the last; by default as it was set when the run was trained"""
    processes: Annotated[int | Literal["auto"], count_or("auto", at_most=1024)] = "auto"
    """training processes on this machine; auto: one per GPU; one on a CPU"""
    max_restarts: Count = Field(3, ge=0)
    """how often to restart all processes after one has died"""
    rank_timeout_seconds: Number = Field(600, ge=1, le=86400)
    """time without an answer after which a process counts as dead"""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """also send curves to Trackio or Weights & Biases; offline unless WANDB_MODE says otherwise"""
    price_per_hour: Number | None = Field(None, ge=0, le=1e9)
    """price of the machine per hour, in any currency, to show the cost"""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run if it exists; never: refuse an existing run"""
