"""A slow copy of a model, which is what gets exported."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Ema(nn.Module):
    """Exponential moving average of a model's parameters; its buffers are copied.

    After each optimiser step: ema = momentum * ema + (1 - momentum) * model. The copy is in eval mode and
    takes no gradients. It is a module, so that it moves between devices and is saved with a checkpoint.

    Args:
        model: the model to follow; it is deep-copied.
        momentum: in 0 to 1, used where `update` is given none.

    Raises:
        ValueError: momentum outside 0 to 1.

    Reference:
        Oquab et al., "DINOv2", 2023, section 5: the average of the student is the distilled model.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.994) -> None:
        super().__init__()
        self.momentum = _checked(momentum)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Ema":
        """Stay in eval mode, whatever `mode` says."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float | None = None) -> None:
        """Move towards `model`.

        Args:
            model: same architecture as at construction.
            momentum: of this step (from a schedule); None takes the constructor's.

        Raises:
            ValueError: momentum outside 0 to 1, or another architecture.
        """
        m = self.momentum if momentum is None else _checked(momentum)
        reshard(self.model)
        own, new = dict(self.model.named_parameters()), dict(model.named_parameters())
        if own.keys() != new.keys():
            raise ValueError("Ema.update needs the model it was made from: the parameter names differ.")
        averaged: list[Tensor] = list(own.values())
        # lerp(a, b, 1 - m) = a + (1 - m) (b - a)
        current = [new[name].detach().to(value.dtype) for name, value in own.items()]
        torch._foreach_lerp_(averaged, current, 1.0 - m)
        buffers = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])


def reshard(model: nn.Module) -> None:
    """Have FSDP2 let go of parameters that it put together for a forward without a backward, such as a validation's."""
    let_go: Callable[[], None] | None = getattr(model, "reshard", None)
    if let_go is not None:
        let_go()


def _checked(momentum: float) -> float:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in 0 to 1, got {momentum}.")
    return momentum
