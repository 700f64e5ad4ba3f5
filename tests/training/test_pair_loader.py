"""fit on a torch DataLoader of pairs: what is exact, what is not, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from core.data import resumable
from core.errors import CheckpointMismatch, InputError
from core.model import GPT, GPTFlexAttention
from core.networks.distributed import Share, World
from core.networks.muon import configure_muon
from core.training.fit import fit
from core.training.pair_loader import NOT_REPLAYED, PairLoader
from tests.makers.modded_models import random_flex
from tests.makers.models import SMALL, TEXT, config, equal, started, tokenizer
from tests.makers.ranks import finished
from tests.makers.runs import bits, fitted, loader, logged, losses, same

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs(rows: int = 22, length: int = 16) -> TensorDataset:
    ids = torch.as_tensor(tokenizer().encode(TEXT * 9).astype("int64"))[: rows * 7 + length]
    windows = ids.unfold(0, length + 1, 7)
    return TensorDataset(windows[:, :-1], windows[:, 1:].int())


def trained(root, *ends, name="dante", data=None, **how):
    """Train to each end in turn, each in a manager and with a loader of its own, as a new process would."""
    for end in ends:
        batches = data() if data else resumable(pairs(), 4, seed=3)
        fitted(started(root, name), end, data_loader=batches, **how)
    return bits(root / name)


@pytest.mark.parametrize(("cut", "accumulation", "workers"), [(1, 1, 0), (5, 1, 2), (4, 3, 0)])
def test_a_resumable_loader_is_exact_from_any_step(tmp_path, capsys, cut, accumulation, workers):
    """An epoch has 5 batches, so that both cuts, and the steps of several micro-steps, meet its end."""
    how = {"gradient_accumulation_steps": accumulation, "data": lambda: resumable(pairs(), 4, 3, num_workers=workers)}
    once = trained(tmp_path / "once", 9, **how)
    assert NOT_REPLAYED not in capsys.readouterr().err
    twice = trained(tmp_path / "twice", cut, 9, strict_resume=True, **how)
    assert capsys.readouterr().err.count("resume is exact\n") == 1
    assert same(once, twice) and losses(tmp_path / "once") == losses(tmp_path / "twice")


def test_the_batches_are_those_of_the_loader_by_number_whatever_is_looked_at_before():
    expected = dict(resumable(pairs(), 4, seed=3).steps(0, 30))
    ours = PairLoader(resumable(pairs(), 4, seed=3), None, accumulation=3)
    for step, micro in [(0, 0), (0, 1), (0, 2), (0, 1), (1, 0), (1, 1), (1, 2), (1, 0), (1, 1), (7, 2), (2, 0)]:
        x, y = ours.batch(step, micro)
        assert torch.equal(x, expected[3 * step + micro][0]) and torch.equal(y, expected[3 * step + micro][1])
        assert x.dtype == y.dtype == torch.int64


def test_the_loader_is_left_where_training_ended(tmp_path):
    batches = resumable(pairs(), 4, seed=3)
    made, model, optimizer = started(tmp_path)
    fitted((made, model, optimizer), 3, data_loader=batches, gradient_accumulation_steps=2)
    assert batches.state_dict()["step"] == 6


def test_another_loader_begins_anew_and_one_line_says_what_is_exact(tmp_path, capsys):
    data = lambda: DataLoader(pairs(), 4)  # noqa: E731
    trained(tmp_path, 3, data=data)
    assert capsys.readouterr().err.count(NOT_REPLAYED) == 1
    trained(tmp_path, 5, data=data)
    assert (
        "resume is not exact; its weights and moments are. The next batches differ: their DataLoader gives them in an "
        f"order of its own.\n{NOT_REPLAYED}\n"
    ) in capsys.readouterr().err
    assert json.loads((tmp_path / "dante/training_state.json").read_text())["certificate"]["batch"] is None
    with pytest.raises(CheckpointMismatch, match=r"order of its own\. This run asked for an exact resume"):
        trained(tmp_path, 6, data=data, strict_resume=True)
    with pytest.raises(CheckpointMismatch, match=r"seed 1337 then, 3 now"):
        trained(tmp_path, 6, strict_resume=True)


def test_another_loader_goes_round_in_its_order():
    given = list(DataLoader(pairs(), 8))
    ours = PairLoader(DataLoader(pairs(), 8), None, accumulation=1)
    for n in range(7):
        assert torch.equal(ours.batch(40 + n)[0], given[n % 3][0])
    assert ours.batch_size == 8 and ours.seed == 1337 and not ours.replays


def test_the_validation_loss_is_the_mean_of_the_first_batches_of_a_loader_and_else_not_measured(tmp_path, capsys):
    assert trained(tmp_path, 4, eval_interval=2) and logged(tmp_path / "dante", "val_loss") == {}
    assert "val loss" not in capsys.readouterr().err
    for name, validation in {"theirs": DataLoader(pairs(), 4), "ours": resumable(pairs(), 4, seed=9)}.items():
        made, model, optimizer = started(tmp_path, name)
        how = {"val_loader": validation, "eval_interval": 2, "eval_iters": 3}
        result = fitted((made, model, optimizer), 4, data_loader=resumable(pairs(), 4, seed=3), **how)
        batches = [b for _, b in resumable(pairs(), 4, seed=9).steps(0, 3)] if name == "ours" else list(validation)[:3]
        model.eval()
        with torch.no_grad():
            mean = sum(model(x, y.long())[1].item() for x, y in batches) / 3
        assert result.val_loss == pytest.approx(mean, rel=1e-6)
        assert list(logged(tmp_path / name, "val_loss")) == [2, 4]


def test_ranks_have_loaders_of_their_own():
    ours = PairLoader(resumable(pairs(), 2, seed=3, rank=1, world_size=2), None, accumulation=3)
    assert ours.share(World(1, 2)) == Share(range(3), slice(None))
    with pytest.raises(InputError, match=r"data_loader: made for 2 ranks, this run has 1\. Make it with their rank"):
        ours.share(World())


def test_each_rank_validates_with_the_first_batches_of_its_own_loader_again_and_again():
    """The second of two ranks is asked for batches 1, 3 and 4 of five, where the first has 0, 2 and 4."""
    ours = PairLoader(resumable(pairs(), 4, 3), DataLoader(pairs(), 4), accumulation=1)
    expected = [x.tolist() for x, _ in DataLoader(pairs(), 4)]
    for _ in range(2):
        assert [ours.val_batch(i)[0].tolist() for i in (1, 3, 4)] == expected[:3]


def test_a_packed_model_takes_one_sequence_a_batch():
    flex = random_flex("small")
    ids = torch.arange(4 * 128).reshape(4, 128) % 50
    data = resumable(TensorDataset(ids, ids), 1, seed=1)
    ours = PairLoader(data, None, 1, packed=True)
    assert ours.batch(0)[0].shape == (128,)
    with pytest.raises(
        InputError, match=r"a batch is a list \[\(2, 128\), \(2, 128\)\], expected a pair .* \[T\] each"
    ):
        PairLoader(resumable(TensorDataset(ids, ids), 2, seed=1), None, 1, packed=True).batch(0)
    assert isinstance(flex, GPTFlexAttention)
    result = fit(flex, data_loader=data, optimizer=configure_muon(flex, 1e-3), max_iters=2, progress=False)
    assert (result.step, result.val_loss) == (2, None)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": torch.zeros(2, 3)}, r"a batch is a dict, expected a pair \(x, y\) of ids \[B, T\] each\."),
        (torch.zeros(2, 3), r"a batch is a Tensor, expected"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), r"a batch is a list \[\(2, 3\), \(2, 4\)\], expected"),
        ((torch.zeros(2, 3), "y"), r"a batch is a list \[\(2, 3\)\], expected"),
        ((torch.zeros(3), torch.zeros(3)), r"a batch is a list \[\(3,\), \(3,\)\], expected"),
        ((torch.zeros(2, 3),) * 2, r"a batch has \['torch.float32', 'torch.float32'\], expected ids"),
    ],
)
def test_a_batch_that_is_no_pair_of_ids_is_refused(batch, said):
    with pytest.raises(InputError, match=f"data_loader: {said}"):
        PairLoader(DataLoader([batch], batch_size=None), None, 1).batch(0)


def test_a_loader_without_a_batch_and_a_val_loader_beside_ours_are_refused():
    with pytest.raises(InputError, match=r"data_loader: a torch DataLoader without a batch"):
        PairLoader(DataLoader([]), None, 1).batch(0)
    model = GPT(config(**SMALL))
    with pytest.raises(InputError, match=r"val_loader: found one beside a data_loader that has batches"):
        model.fit(data_loader=loader(), optimizer=None, max_iters=1, val_loader=DataLoader(pairs()))


@pytest.mark.full  # five processes
def test_two_ranks_train_on_the_samples_of_one_process_and_resume_exactly(tmp_path):
    def run(name, ranks, *ends):
        for end in ends:
            forked = ["tests.makers.forked", str(ranks)] if ranks > 1 else []
            words = [*forked, "tests.makers.pair_ranks", str(tmp_path / name), str(end), str(4 // ranks)]
            done = finished([sys.executable, "-m", *words])
            assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / name / "dante/model.pt", weights_only=True), done.stderr

    alone, _ = run("alone", 1, 12)
    once, _ = run("once", 2, 12)
    twice, said = run("twice", 2, 5, 12)
    assert equal(once, twice) and "resume is exact\n" in said and "lose_at_most 0.001 s cannot be kept" in said
    assert all(torch.allclose(alone[name], once[name], atol=1e-6) for name in alone)
    assert logged(tmp_path / "once/dante") == logged(tmp_path / "twice/dante")
