"""Dynamic loss scaling, for fp16.

Micikevicius et al., "Mixed precision training" (2018): small gradients vanish in fp16, whose
smallest number is 6e-8, unless the loss is multiplied first; too large a factor makes them overflow
beyond 65,504, so it is found by trying. torch.amp.GradScaler does so on the device, for each
optimizer on its own; here each step's gradient norm is read anyway, and is the same on all ranks.
"""

from dataclasses import dataclass
from math import isfinite

# The largest gradients of a micro-batch's mean loss are 1.5 (GPT-2) and 1.8 (Qwen3) in the first
# step of 124M parameters, and 65,504 / 2^14 is 4. GradScaler begins with 2^16, and with a step that
# is skipped.
_INITIAL_SCALE = 2.0**14
# As torch.amp.GradScaler.
_UPDATES_TO_GROWTH = 2000
# Below this, fp16's range is not what is wrong.
_MIN_SCALE = 1.0


@dataclass
class LossScale:
    """The factor of the loss: halved after an overflow, doubled after 2,000 updates without one.

    Attributes:
        factor: the current factor, of the mean loss of each micro-batch
        updates: updates since it changed
    """

    factor: float = _INITIAL_SCALE
    updates: int = 0

    def skips(self, train_loss: float, grad_norm: float) -> bool:
        """Return True if a step's update must be skipped, and adapt the factor for the next step.

        Only a gradient that overflows can be mended by a smaller factor. If the loss is not finite,
        the forward pass has overflowed, which no factor changes.

        Args:
            train_loss: before it was multiplied.
            grad_norm: norm of the gradients of the multiplied loss.
        """
        if isfinite(grad_norm):
            self.updates += 1
            if self.updates == _UPDATES_TO_GROWTH:
                self.factor, self.updates = 2 * self.factor, 0
            return False
        if not isfinite(train_loss) or self.factor / 2 < _MIN_SCALE:
            return False
        self.factor, self.updates = self.factor / 2, 0
        return True
