"""The optimizers: AdamW, or Muon for the blocks' matrices and AdamW for the rest."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from app.settings.train import TrainSettings
from app.train.muon import Muon


class Optimizers:
    """One or more torch optimizers that together hold every parameter once."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step, for all parameters."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate

    def step(self) -> None:
        """Update every parameter from its gradient, and release the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter, by name."""
        return self._owner(parameter).state[parameter]

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and dtypes that `load` takes; without memory."""
        like = torch.empty_like(parameter, device="meta")
        owner = self._owner(parameter)
        if isinstance(getattr(owner, "optim", owner), Muon):
            return {"momentum_buffer": like}
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

    def _owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            part
            for part in self.parts
            for group in part.param_groups
            if any(held is parameter for held in group["params"])
        )

    def join_gather(self, model: nn.Module) -> None:
        """Take part in rank 0's iteration over `named_state`, if that gathers from all ranks."""


def build_optimizers(
    model: nn.Module,
    cfg: TrainSettings,
    muon_dtype: torch.dtype = torch.float32,
) -> Optimizers:
    """Build AdamW for every parameter, or Muon for the blocks' matrices and AdamW for the rest.

    AdamW: Loshchilov and Hutter, 2019. Muon: app.train.muon. Both use one learning rate.
    Embeddings are matrices too, but each row is updated independently, so they go to AdamW.
    With weight decay on `matrices`, biases and layer norms do not decay: their scale matters.

    Args:
        muon_dtype: dtype of Muon's iterations.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for_adamw: dict[float, list[nn.Parameter]] = {cfg.weight_decay: [], 0.0: []}
    for_muon = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2
        if cfg.optimizer == "muon" and is_matrix and parameter not in embeddings:
            for_muon.append(parameter)
        else:
            decays = is_matrix or cfg.weight_decay_on == "all"
            for_adamw[cfg.weight_decay if decays else 0.0].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for decay, parameters in for_adamw.items()
        if parameters
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=cfg.betas, fused=True)]
    if for_muon:
        parts.append(Muon(for_muon, weight_decay=cfg.weight_decay, dtype=muon_dtype))
    return Optimizers(*parts)
