from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.data.tokenizer import make_char
from core.errors import CheckpointMismatch, CheckpointNotFound, InputError
from core.model import GPT
from tests.makers.models import (
    SMALL,
    TEXT,
    equal,
    kept,
    manager,
    save_durably,
    save_steps,
    started,
    state_of,
    tokenizer,
    train_and_save,
    update,
    weights,
)


def test_a_saved_bundle_is_five_plain_files_that_plain_torch_reads(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    folder = tmp_path / "dante"
    files = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    assert files == ["config.json", "model.pt", "optimizer.pt", "tokenizer.json", "training_state.json"]
    assert not any(p.is_symlink() for p in folder.iterdir())
    assert equal(torch.load(folder / "model.pt", weights_only=True), model.state_dict())
    assert list(state_of(folder))[:2] == ["step", "optimizer_file"]
    assert state_of(folder)["step"] == 1
    assert json.loads((folder / "tokenizer.json").read_text())["chars"] == sorted(set(TEXT))
    assert json.loads((folder / "config.json").read_text())["n_embd"] == 32


def test_resume_restores_every_bit_of_weights_and_moments(tmp_path):
    model, optimizer = save_steps(tmp_path, 3)
    again, resumed, moments = started(tmp_path)
    assert (resumed.step, again.resumed["step"]) == (3, 3)
    assert equal(resumed.state_dict(), model.state_dict())
    update(model, optimizer), update(resumed, moments)
    assert equal(resumed.state_dict(), model.state_dict())
    for a, b in zip(optimizer.state.values(), moments.state.values(), strict=True):
        assert equal(a, b)


def test_keep_best_every_and_resumed_from_stay_and_the_rest_goes(tmp_path):
    save_steps(tmp_path, 3, keep=2, val_loss=lambda step: 1.0 if step == 2 else 2.0)
    made, model, optimizer = started(tmp_path, keep=2, keep_every=5)
    train_and_save(made, model, optimizer, 9, val_loss=lambda step: 2.0 + step)
    folder = tmp_path / "dante"
    assert state_of(folder)["best"] == {"step": 2, "val_loss": 1.0}
    assert kept(folder) == [f"step_{s:08d}" for s in (2, 3, 5, 10, 11)]
    best = CheckpointManager.load_for_inference("dante", tmp_path, step="best")
    assert best.step == 2


def test_every_kept_step_is_a_whole_bundle_with_the_weights_of_its_step(tmp_path):
    made, model, optimizer = started(tmp_path, keep=5)
    seen = {}
    for _ in range(4):
        train_and_save(made, model, optimizer, 1)
        seen[model.step] = weights(model)
    for step, expected in seen.items():
        loaded = CheckpointManager.load_for_inference("dante", tmp_path, step=step)
        assert loaded.step == step and equal(loaded.state_dict(), expected)
    with pytest.raises(CheckpointNotFound, match=r"step_00000009: this step is not kept\. Kept steps: 1, 2, 3"):
        CheckpointManager.load_for_inference("dante", tmp_path, step=9)


def test_the_same_state_at_the_same_step_again_changes_nothing(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 2)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "dante").rglob("*") if p.is_file()}
    save_durably(made, model, optimizer, step=2)
    assert before == {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in before}
    assert kept(tmp_path / "dante") == ["step_00000001"]


def test_hand_edited_wishes_survive_saves_and_hold_on_resume(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    path = tmp_path / "dante/config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "batch_size": 7, "dropout": 0.4, "note": "mine"}))
    train_and_save(made, model, optimizer, 1)
    made.close()
    assert json.loads(path.read_text())["note"] == "mine"
    again = manager(tmp_path)
    resumed, _, _ = again.initialize_for_training({}, "char", None, 1e-3)
    assert (resumed.config.batch_size, resumed.config.dropout, resumed.blocks[0].dropout) == (7, 0.4, 0.4)
    assert resumed.config.unknown == {"note": "mine"}


def test_a_flag_wins_over_config_json_which_wins_over_the_preset(tmp_path):
    save_steps(tmp_path, 1)
    again = manager(tmp_path)
    resumed, _, _ = again.initialize_for_training(
        {"batch_size": 9}, "char", None, 1e-3, preset={"batch_size": 1, "dropout": 0.9, "n_layer": 5}
    )
    assert (resumed.config.batch_size, resumed.config.dropout, resumed.config.n_layer) == (9, 0.1, 2)


def test_another_architecture_is_refused_with_both_values(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(CheckpointMismatch, match="n_head is 4 here and 2 in the checkpoint; n_layer is 3 here and 2"):
        manager(tmp_path).initialize_for_training({"n_head": 4, "n_layer": 3}, "char", None, 1e-3)


def test_another_tokenizer_is_refused_and_both_are_shown(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(
        CheckpointMismatch, match=r"trained with char, \d+ characters.*; this run has char, 3 characters"
    ):
        manager(tmp_path).initialize_for_training({}, make_char(["abc"]), None, 1e-3)
    with pytest.raises(CheckpointMismatch, match=r"trained with char, \d+ characters.*; this run has gpt2"):
        manager(tmp_path).initialize_for_training({}, "gpt2", None, 1e-3)


def test_fewer_positions_than_the_other_model_has_are_the_first_ones_and_said(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 2)
    whole, lines = model.config.block_size, []
    with CheckpointManager("child", tmp_path, say=lines.append) as child:
        born, moments, _ = child.initialize_for_training(
            {"block_size": whole // 2}, tokenizer(), None, 1e-3, init_from_model="dante"
        )
        assert f"block_size: the first {whole // 2} of the {whole} positions of dante, the others are cropped" in lines
        assert born.config.block_size == born.position_embedding_table.num_embeddings == whole // 2
        for name, tensor in model.state_dict().items():
            rows = tensor[: whole // 2] if name.startswith("position_embedding_table") else tensor
            assert torch.equal(born.state_dict()[name], rows)
        ids = torch.arange(whole // 2)[None] % model.config.vocab_size
        assert torch.equal(born.eval()(ids)[0], model.eval()(ids)[0])
        born.train()
        born(ids, ids)[1].backward()
        moments.step()
        child.save(born, moments, step=1)
        child.wait()
    assert GPT.load(tmp_path / "child")[0].config.block_size == whole // 2
    with pytest.raises(CheckpointMismatch, match=rf"block_size is {2 * whole} here and {whole} in the checkpoint"):
        manager(tmp_path, "more").initialize_for_training(
            {"block_size": 2 * whole}, tokenizer(), None, 1e-3, init_from_model="dante"
        )
    with pytest.raises(CheckpointMismatch, match="block_size is"):  # a run that goes on has the positions it had
        manager(tmp_path).initialize_for_training({"block_size": whole // 2}, tokenizer(), None, 1e-3)


def test_a_new_model_starts_from_the_weights_of_another(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 2)
    child = manager(tmp_path, "child")
    born, fresh, step = child.initialize_for_training({}, tokenizer(), None, 1e-3, init_from_model="dante")
    assert step == 0 and born.step == 0 and not fresh.state
    assert equal(born.state_dict(), model.state_dict())
    other = make_char([TEXT + "xyzq%"])
    with pytest.raises(
        CheckpointMismatch, match=r"this run has char, .*Train on that text, or leave --init_from_model out"
    ):
        manager(tmp_path, "third").initialize_for_training({}, other, None, 1e-3, init_from_model="dante")
    with pytest.raises(CheckpointMismatch, match=r"n_layer is 9 here and 2 in the checkpoint"):
        manager(tmp_path, "deep").initialize_for_training(
            {"n_layer": 9}, tokenizer(), None, 1e-3, init_from_model="dante"
        )
    with pytest.raises(CheckpointNotFound, match="nobody"):
        manager(tmp_path, "fourth").initialize_for_training({}, other, None, 1e-3, init_from_model="nobody")


def test_a_folder_with_only_a_config_is_a_new_model_of_that_architecture(tmp_path):
    folder = tmp_path / "dante"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMALL, "n_layer": 5, "vocab_size": tokenizer().vocab_size}))
    made = manager(tmp_path)
    model, _, step = made.initialize_for_training({}, tokenizer(), None, 1e-3, preset={"n_layer": 1, "n_embd": 64})
    assert (model.config.n_layer, model.config.n_embd, step) == (5, 32, 0)


OLD_HEAD = {"tied_head": False, "head_bias": True}
"""The head of models before new ones had nanoGPT's, which GPTConfig's defaults still say."""


@pytest.mark.parametrize(
    ("config", "preset", "tied", "has_bias"),
    [
        (SMALL, {}, True, False),
        (GPTConfig(**SMALL), {}, True, False),  # what equals a default of GPTConfig is not said
        ({**SMALL, **OLD_HEAD}, {}, False, True),
        (GPTConfig(**SMALL).to_dict() | {"vocab_size": tokenizer().vocab_size}, {}, False, True),
        ({**SMALL, "tied_head": False}, {}, False, False),
        ({**SMALL, "head_bias": True}, {}, True, True),
        (SMALL, OLD_HEAD, False, True),
        ({**SMALL, "tied_head": True}, OLD_HEAD, True, True),
    ],
)
def test_a_new_model_has_the_head_of_nanogpt_unless_its_config_says_otherwise(tmp_path, config, preset, tied, has_bias):
    made = manager(tmp_path)
    model, optimizer, _ = made.initialize_for_training(config, tokenizer(), None, 1e-3, preset=preset)
    assert (model.config.tied_head, model.config.head_bias) == (tied, has_bias)
    assert (model.lm_head.weight is model.token_embedding_table.weight) is tied
    assert (model.lm_head.bias is not None) is has_bias
    train_and_save(made, model, optimizer, 1)
    made.close()
    resumed = manager(tmp_path).initialize_for_training(GPTConfig(**SMALL), "char", None, 1e-3)[0]
    assert resumed.config == model.config and equal(resumed.state_dict(), model.state_dict())


def test_a_bundle_of_before_goes_on_with_its_own_head_bit_for_bit(tmp_path):
    made, model, optimizer = started(tmp_path, config={**SMALL, **OLD_HEAD})
    train_and_save(made, model, optimizer, 2)
    made.close()
    path = tmp_path / "dante/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in OLD_HEAD}))
    resumed, moments, _ = manager(tmp_path).initialize_for_training({}, "char", None, 1e-3)
    update(model, optimizer), update(resumed, moments)
    assert resumed.lm_head.bias.any() and equal(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize(("fields", "tied"), [({}, False), ({"tied_head": True}, True), (OLD_HEAD, False)])
def test_a_config_alone_says_its_head_also_by_what_it_lacks(tmp_path, fields, tied):
    (tmp_path / "dante").mkdir()
    (tmp_path / "dante/config.json").write_text(json.dumps({**SMALL, **fields}))
    model = manager(tmp_path).initialize_for_training({}, tokenizer(), None, 1e-3, preset={"n_layer": 1})[0]
    assert (model.config.tied_head, model.config.head_bias) == (tied, True)
    again = manager(tmp_path, "dante")
    with pytest.raises(CheckpointMismatch, match=f"tied_head is {not tied} here and {tied} in the checkpoint"):
        again.initialize_for_training({"tied_head": not tied}, tokenizer(), None, 1e-3)


def test_the_same_seed_gives_the_same_fresh_weights_and_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = manager(tmp_path, "a").initialize_for_training(SMALL, tokenizer(), None, 1e-3)[0]
    assert torch.equal(torch.rand(3), expected)
    b = manager(tmp_path, "b").initialize_for_training(SMALL, tokenizer(), None, 1e-3)[0]
    c = manager(tmp_path, "c").initialize_for_training(SMALL, tokenizer(), None, 1e-3, seed=2)[0]
    assert equal(a.state_dict(), b.state_dict()) and not equal(a.state_dict(), c.state_dict())


@pytest.mark.parametrize("name", ["../other/model.pt", "/etc/passwd", "", "."])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"expected the name of a file|leads out of"):
        manager(tmp_path).get_path(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b"])
def test_a_model_name_is_the_name_of_one_folder(tmp_path, name):
    with pytest.raises(InputError, match="expected the name of one folder"):
        CheckpointManager(name, tmp_path)


def test_existence_is_told_by_format(tmp_path):
    made = manager(tmp_path)
    assert not (made.exists() or made.exists_new_format() or made.exists_legacy_format())
    (tmp_path / "dante").mkdir()
    torch.save({}, tmp_path / "dante/final.pt")
    assert made.exists() and not made.exists_new_format()
    assert made.exists_legacy_format("final.pt") and not made.exists_legacy_format()
    (tmp_path / "dante/final.pt").unlink()
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    assert made.exists_new_format()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("view", torch.arange(1000.0)[10:12])


@pytest.mark.parametrize(
    "wrap", [lambda m: m, torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))]
)
def test_any_module_saves_under_plain_names_ties_once_and_views_without_the_rest(tmp_path, wrap):
    module = Tied()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.a(torch.ones(3)).sum().backward()
    optimizer.step()
    made = manager(tmp_path, "tied")
    save_durably(made, wrap(module), optimizer, step=4, extra={"mine": 1})
    found = torch.load(tmp_path / "tied/model.pt", weights_only=True)
    assert set(found) == {"a.weight", "a.bias", "b.weight", "b.bias", "view"}
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    assert found["view"].untyped_storage().nbytes() == 8
    assert json.loads((tmp_path / "tied/config.json").read_text())["model_class"] == "Tied"
    assert state_of(tmp_path / "tied")["extra"] == {"mine": 1}
    other = Tied()
    moments = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    assert manager(tmp_path, "tied").load(other, moments) == 4
    assert equal(other.state_dict(), module.state_dict())
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert a not in optimizer.state or equal(optimizer.state[a], moments.state[b])


def test_a_foreign_module_is_not_built_for_inference_and_the_message_says_what_to_do(tmp_path):
    save_durably(manager(tmp_path, "tied"), Tied(), step=1)
    with pytest.raises(
        CheckpointMismatch, match=r"model_class is 'Tied', expected GPT.*CheckpointManager.load\(model\)"
    ):
        CheckpointManager.load_for_inference("tied", tmp_path)


def test_loading_into_another_shape_is_refused_and_changes_nothing(tmp_path):
    save_durably(manager(tmp_path, "tied"), nn.Linear(3, 3), step=1)
    module = nn.Linear(3, 4)
    before = weights(module)
    with pytest.raises(
        CheckpointMismatch, match=r"tied/model.pt does not fit this model: weight is \(3, 3\), expected \(4, 3\)"
    ):
        manager(tmp_path, "tied").load(module)
    assert equal(before, weights(module))


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointNotFound, match="nobody: no such folder"):
        CheckpointManager.load_for_inference("nobody", tmp_path)


def test_a_bundle_of_version_one_resumes_and_its_files_are_kept(tmp_path):
    model, optimizer = save_steps(tmp_path, 1)
    folder = tmp_path / "dante"
    (folder / "training_state.json").write_text('{"step": 1, "optimizer_file": "optimizer.pt"}')
    old = (folder / "model.pt").read_bytes()
    made, model, optimizer = started(tmp_path)
    assert model.step == 1
    train_and_save(made, model, optimizer, 3)
    assert kept(folder) == ["step_00000001", "step_00000003"]
    assert (folder / "step_00000001/model.pt").read_bytes() == old


def test_weights_alone_can_be_shared(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    shared = tmp_path / "elsewhere" / "dante"
    shared.mkdir(parents=True)
    for name in ("model.pt", "config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "dante" / name, shared / name)
    loaded = CheckpointManager.load_for_inference("dante", shared.parent)
    assert equal(loaded.state_dict(), model.state_dict()) and loaded.step == 0
    assert isinstance(loaded.generate("In", max_new_tokens=3), str)
    assert loaded.config == GPTConfig.from_dict(model.config.to_dict())


def test_metrics_and_extra_that_are_no_json_are_refused_before_anything_is_written(tmp_path):
    made, model, optimizer = started(tmp_path)
    with pytest.raises(InputError, match=r"metrics or extra of step 1: .*JSON"):
        save_durably(made, model, optimizer, step=1, metrics={"loss": float("nan")})
    with pytest.raises(InputError, match=r"metrics or extra of step 1: .*not JSON serializable"):
        save_durably(made, model, optimizer, step=1, extra={"model": model})
    with pytest.raises(InputError, match=r"metrics: step means something else in the training state"):
        save_durably(made, model, optimizer, step=1, metrics={"step": 2.0})
    assert not (tmp_path / "dante/model.pt").exists()


def test_a_config_that_stands_alone_is_not_overruled_by_a_flag(tmp_path):
    (tmp_path / "dante").mkdir()
    (tmp_path / "dante/config.json").write_text(json.dumps({**SMALL, "vocab_size": tokenizer().vocab_size}))
    with pytest.raises(CheckpointMismatch, match=r"n_layer is 7 here and 2 in the checkpoint"):
        manager(tmp_path).initialize_for_training({"n_layer": 7}, tokenizer(), None, 1e-3)
