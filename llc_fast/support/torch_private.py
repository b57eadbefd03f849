"""torch's private names, used here and nowhere else."""

from __future__ import annotations

import torch
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would import all of its compiler to keep it away from the method
        return False


def is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks see the optimizer's steps, its own or those for all optimizers, or a profiler runs."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    if torch.compiler.is_compiling():  # it can't look at the profiler
        return False
    return bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled())
