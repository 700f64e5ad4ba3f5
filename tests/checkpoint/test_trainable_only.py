"""Steps that hold only what is trained: the frozen base is known by digest, and has to be there at a load."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convert_checkpoints
import inspect_model
import train
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED
from core.errors import CheckpointMismatch, InputError
from core.networks import frozen
from tests.makers.models import equal, manager, save_durably, started, state_of


class LoRA(nn.Module):
    """A frozen linear layer with a trained product of two small matrices beside it."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 4).to(dtype).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(4, 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += 1
        return self.base(x.to(self.base.weight.dtype)).float() + x @ self.a.T @ self.b.T


def made(dtype=torch.float32):
    model = LoRA(dtype)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(model, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model, optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    return {name: tensor.clone() for name, tensor in (model.state_dict() | moments).items()}


@pytest.fixture
def saved(tmp_path):
    """A folder with 5 steps of a run, saved without its base; and the bits after 10."""
    model, optimizer = made()
    steps(model, optimizer, 0, 5)
    with manager(tmp_path) as keeper:
        save_durably(keeper, model, optimizer, step=5, trainable_only=True)
    steps(model, optimizer, 5, 10)
    return tmp_path, bits(model, optimizer)


def test_only_what_is_trained_is_written_and_a_resume_is_exact(saved):
    root, after = saved
    content = torch.load(root / "dante/model.pt", weights_only=True)
    assert set(content) == {"a", "b", "seen"} and content["seen"] == 5
    assert state_of(root / "dante")["frozen"]["base.weight"]["shape"] == [4, 6]
    model, optimizer = made()
    with manager(root) as keeper:
        assert keeper.load(model, optimizer) == 5
        steps(model, optimizer, 5, 10)
        assert equal(bits(model, optimizer), after)
        save_durably(keeper, model, optimizer, step=10, trainable_only=True)
        save_durably(keeper, model, optimizer, step=11)
    assert "frozen" not in state_of(root / "dante")
    assert equal(torch.load(root / "dante/model.pt", weights_only=True), model.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.base.weight.data[0].add_(1), r"base\.weight is float32 \[4, 6\] \(CRC32 "),
        (lambda model: model.base.bfloat16(), r"base\.weight is bfloat16 \[4, 6\]"),
        (lambda model: setattr(model, "base", nn.Linear(6, 4, bias=False)), r"base\.weight is float32"),
        (lambda model: setattr(model, "base", nn.Identity()), r"base\.weight is not there, or on the meta device"),
        (lambda model: model.base.to("meta"), r"base\.weight is not there, or on the meta device"),
        (lambda model: setattr(model, "a", nn.Parameter(torch.zeros(3, 6))), r"a is \(2, 6\), expected \(3, 6\)"),
        (lambda model: setattr(model, "c", nn.Parameter(torch.zeros(1))), r"does not fit this model: missing: c"),
    ],
)
def test_another_base_is_refused_with_the_tensor_and_nothing_is_changed(change, said, saved):
    root, _ = saved
    model, optimizer = made()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=said):
        manager(root).load(model, optimizer)
    after = model.state_dict()
    assert all(tensor.is_meta or torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digests_are_of_the_values_whatever_their_layout(dtype):
    model = LoRA(dtype)
    found = frozen.Frozen().of(model)
    model.base.weight.data = model.base.weight.data.T.contiguous().T
    assert frozen.Frozen().of(model) == found
    assert found["base.bias"]["dtype"] == str(dtype).removeprefix("torch.")


def test_a_digest_is_computed_once_until_the_tensor_changes(saved, monkeypatch):
    root, _ = saved
    model, optimizer = made()
    with manager(root) as keeper:
        keeper.load(model, optimizer)
        monkeypatch.setattr(frozen.zlib, "crc32", lambda *_: pytest.fail("computed again"))
        keeper.save(model, optimizer, step=6, trainable_only=True)
        monkeypatch.undo()
        keeper.wait()
        with torch.no_grad():
            model.base.weight += 1
        with pytest.raises(InputError, match=r"base\.weight require no gradient, and have changed since the step befo"):
            keeper.save(model, optimizer, step=7, trainable_only=True)
        assert keeper.saved_step() == 6
        save_durably(keeper, model, optimizer, step=7)


def test_a_module_without_anything_to_train_is_refused_and_one_without_anything_frozen_is_whole(tmp_path):
    model, _ = made()
    with manager(tmp_path) as keeper:
        with pytest.raises(InputError, match="no parameter requires a gradient, so none is saved"):
            keeper.save(model.requires_grad_(False), step=1, trainable_only=True)
        save_durably(keeper, model.requires_grad_(True), step=1, trainable_only=True)
    assert "frozen" not in state_of(tmp_path / "dante")


def test_it_is_shown_and_no_model_is_made_of_it_alone(tmp_path, capsys):
    keeper, model, _ = started(tmp_path)
    model.requires_grad_(False).lm_head.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    save_durably(keeper, model, optimizer, step=3, trainable_only=True)
    keeper.close()
    count = len(state_of(tmp_path / "dante")["frozen"])
    said = f"dante/model.pt: holds only what was trained; {count} frozen tensors are not in it. Make the module with"
    with pytest.raises(CheckpointMismatch, match=said):
        CheckpointManager.load_for_inference("dante", tmp_path)
    with pytest.raises(CheckpointMismatch, match=said), manager(tmp_path) as again:
        again.initialize_for_training({}, "char", None, 1e-3)
    with pytest.raises(CheckpointMismatch, match=said):
        train.main(["--model_name", "dante", "--checkpoint_root", str(tmp_path), "--max_iters", "9"])
    capsys.readouterr()
    assert inspect_model.main([str(tmp_path / "dante"), "--verify"]) in (DONE, FAILED)
    shown = capsys.readouterr().out
    assert f"frozen    : {count} tensors of its base, known by checksum only, are not in model.pt" in shown
    assert "contradiction" not in shown and "nothing is damaged" in shown
    other = type(model)(model.config)
    other.load_state_dict({n: t for n, t in model.state_dict().items() if "lm_head" not in n}, strict=False)
    assert manager(tmp_path).load(other, torch.optim.AdamW(other.lm_head.parameters())) == 3
    assert equal(other.state_dict(), model.state_dict())


def test_a_conversion_says_what_is_not_there_and_makes_no_model_of_it(saved, capsys):
    root, _ = saved
    assert convert_checkpoints.main([str(root / "dante"), str(root / "adapter.pt"), "--to", "pt"]) == DONE
    assert "WARNING: only what was trained is here; 2 frozen tensors of its base are not" in capsys.readouterr().out
    assert set(torch.load(root / "adapter.pt", weights_only=True)) == {"a", "b", "seen"}
    with pytest.raises(CheckpointMismatch, match="holds only what was trained; 2 frozen tensors are not in it"):
        convert_checkpoints.main([str(root / "dante"), str(root / "copy"), "--to", "bundle"])
