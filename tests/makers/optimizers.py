"""Optimizers that keep their state in unusual places."""

from __future__ import annotations

from collections import defaultdict

import torch


class Counting(torch.optim.Optimizer):
    """Keeps numbers and tensors in its groups, lists and texts in its state, and a count of its own in `state`."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "weight_sum": 0.0, "d": None, "seen": ()})
        for group in self.param_groups:
            group["d"] = torch.tensor(0.5, dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.state["all"] = {"steps": self.state.get("all", {"steps": 0})["steps"] + 1, "sum": torch.ones(3)}
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["k"] ** 2
            group["d"] = group["d"] * 0.75
            group["seen"] = (*group["seen"], group["d"].float())[-3:]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"z": p.double(), "rows": [p.grad.sum(dim=0)], "kind": "plain", "none": [None, 1.5]}
                state["z"].sub_(p.grad, alpha=group["lr"] * float(group["d"]) / self.state["all"]["steps"])
                state["rows"] = [*state["rows"], p.grad.sum(dim=0)][-2:]
                p.lerp_(state["z"].to(p.dtype), group["k"] ** 2 / group["weight_sum"])
                p.add_(sum(state["rows"]), alpha=1e-3 * float(sum(group["seen"])))
                assert state["kind"] == "plain" and state["none"] == [None, 1.5]


class Wrapper(torch.optim.Optimizer):
    """As AcceleratedOptimizer: shows the groups and the state of the optimizer that it holds, without torch's hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Imitation:
    """As Fabric's optimizer: no optimizer by construction, everything that it lacks is that of the one it holds."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitation" + type(optimizer).__name__, (Imitation, type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Sharpness(torch.optim.Optimizer):
    """As SAM: steps an optimizer over its own groups, whose state it leaves out of its state dict."""

    def __init__(self, params, base=torch.optim.AdamW):
        super().__init__(params, {"rho": 0.05})
        self.base = base(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class Fragile(torch.optim.SGD):
    """An optimizer whose own `load_state_dict` fails after it has changed something."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        raise ValueError("no slot 7")


class Bare(torch.optim.Optimizer):
    """An optimizer that does not call torch's constructor: it has no hooks."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": 0.5}]
        self.state, self.defaults = defaultdict(dict), {"lr": 0.5}

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
