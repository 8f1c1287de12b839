"""The optimizers: AdamW, or Muon for the blocks' matrices and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from app.model.language_model import LanguageModel
from app.settings.train import TrainSettings
from app.train.muon import Muon

# The kinds of parameters that decay, by the setting TRAIN_WEIGHT_DECAY_ON.
_DECAYING = {
    "blocks": ("matrix",),
    "matrices": ("matrix", "embedding"),
    "all": ("matrix", "embedding", "vector"),
}


class Optimizers:
    """One or more torch optimizers that together hold every parameter once.

    Args:
        parts: AdamW, or ones with `state_names`: the tensors that they keep for each parameter, of
            its shape. A parameter group may have `lr_ratio`, its learning rate relative to the
            others'.
        momentum_warmup_steps: steps in which Muon's momentum rises to its full value.

    Attributes:
        part_of: parameter -> the optimizer that updates it
    """

    def __init__(self, *parts: torch.optim.Optimizer, momentum_warmup_steps: int = 0) -> None:
        self.parts, self.momentum_warmup_steps = parts, momentum_warmup_steps
        self.part_of: dict[nn.Parameter, torch.optim.Optimizer] = {
            parameter: part
            for part in parts
            for group in part.param_groups
            for parameter in group["params"]
        }

    def begin_step(self, step: int, learning_rate: float) -> None:
        """Set the learning rate and Muon's momentum of step 0, 1, …."""
        momentum = muon_momentum(step, self.momentum_warmup_steps)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
                if "momentum" in group:
                    group["momentum"] = momentum

    def step(self) -> None:
        """Update every parameter from its gradient, and release the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def skip_step(self) -> None:
        """Release the gradients, and update nothing.

        Parameters that have no state yet get what the first update would begin with: a checkpoint
        holds the state of all.
        """
        for parameter in self.part_of:
            if not self.state(parameter):
                empty = self.empty_state(parameter).items()
                zeros = {slot: torch.zeros(it.shape, dtype=it.dtype) for slot, it in empty}
                self.load(parameter, zeros)
            parameter.grad = None

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter, by name."""
        return self.part_of[parameter].state[parameter]

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and dtypes that `load` takes; without memory."""
        like = torch.empty_like(parameter, device="meta")
        part = self.part_of[parameter]
        if names := getattr(getattr(part, "optim", part), "state_names", ()):
            return dict.fromkeys(names, like)
        return {"exp_avg": like, "exp_avg_sq": like, "step": torch.empty((), device="meta")}

    def load(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Copy the state of a parameter, by name, into its optimizer."""
        self.state(parameter).update(
            {name: value.to(parameter.device, copy=True) for name, value in state.items()}
        )

    def named_state(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the state of all parameters, as (`exp_avg.transformer.wte.weight`, tensor)."""
        for name, parameter in model.named_parameters():
            for slot, value in self.state(parameter).items():
                yield f"{slot}.{name}", value

    def join_gather(self, model: nn.Module) -> None:
        """Take part in rank 0's iteration over `named_state`, if that gathers from all ranks."""


def build_optimizers(
    model: LanguageModel,
    cfg: TrainSettings,
    muon_dtype: torch.dtype = torch.float32,
) -> Optimizers:
    """Build AdamW for every parameter, or Muon for the blocks' matrices and AdamW for the rest.

    AdamW: Loshchilov and Hutter, 2019. Muon: app.train.muon. Embeddings are matrices too, but each
    row is updated independently, so they go to AdamW, and may have a learning rate of their own.
    Biases and layer norms decay only with weight decay on `all`: their scale matters.

    Args:
        muon_dtype: dtype of Muon's iterations.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(model.head_weight)
    embedding_ratio = (cfg.embedding_learning_rate or cfg.learning_rate) / cfg.learning_rate
    # By (learning rate relative to the others', weight decay), and by the number of matrices.
    for_adamw, for_muon = defaultdict(list), defaultdict(list)
    for name, parameter in model.named_parameters():
        kind = "matrix" if parameter.ndim == 2 else "vector"
        kind = "embedding" if parameter in embeddings else kind
        if cfg.optimizer == "muon" and kind == "matrix":
            for_muon[_stacked(model, name) if cfg.muon_split else 1].append(parameter)
        else:
            ratio = embedding_ratio if kind == "embedding" else 1.0
            decays = kind in _DECAYING[cfg.weight_decay_on]
            for_adamw[ratio, cfg.weight_decay if decays else 0.0].append(parameter)
    groups = [
        {"params": parameters, "lr_ratio": ratio, "weight_decay": decay}
        for (ratio, decay), parameters in for_adamw.items()
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=cfg.betas, fused=True)]
    if for_muon:
        of_muon = [{"params": it, "stacked": stacked} for stacked, it in for_muon.items()]
        parts.append(Muon(of_muon, weight_decay=cfg.weight_decay, dtype=muon_dtype))
    return Optimizers(*parts, momentum_warmup_steps=cfg.momentum_warmup_steps)


def muon_momentum(step: int, warmup_steps: int) -> float:
    """Return Muon's momentum in step 0, 1, …: it rises linearly from 0.85 to 0.95.

    Source: Jordan et al., modded-nanogpt (2024), record 9.
    """
    return 0.95 if step >= warmup_steps else 0.85 + 0.1 * step / warmup_steps


def _stacked(model: LanguageModel, name: str) -> int:
    """Return how many matrices a parameter of the model stores one below the other."""
    counts = model.stacked_matrices.items()
    return next((count for ending, count in counts if name.endswith(ending)), 1)
