"""Methods whose code lives elsewhere show their signature and their docstring, and cost nothing until they are used."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys

import pytest

from core.kinds import model_methods
from core.loading.optimizer import configure_optimizer
from core.model import GPT, GPTBatched, GPTFlexAttention
from core.training.fit import fit
from tests.conftest import ROOT
from tests.makers.models import config


@pytest.mark.parametrize(
    ("owner", "name", "function"),
    [
        (GPT, "fit", fit),
        (GPT, "configure_optimizer", configure_optimizer),
        (GPT, "load", model_methods.load),
        (GPT, "load_legacy", model_methods.load_legacy),
        (GPT, "save", model_methods.save),
        *(
            (owner, "save_checkpoint_bundle", model_methods.save_checkpoint_bundle)
            for owner in (GPT, GPTBatched, GPTFlexAttention)
        ),
    ],
)
def test_a_bound_method_is_the_function_with_its_signature_and_its_docstring(owner, name, function):
    assert getattr(owner, name) is function
    found = inspect.signature(getattr(owner, name))
    kinds = {parameter.kind for parameter in found.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    assert function.__doc__.splitlines()[0] in pydoc.render_doc(getattr(owner, name))


def test_the_method_of_a_model_has_no_model_among_its_parameters():
    model = GPT(config())
    assert [*inspect.signature(model.fit).parameters] == [*inspect.signature(fit).parameters][1:]
    assert [*inspect.signature(model.load).parameters] == [*inspect.signature(GPT.load).parameters]
    assert "data_loader" in pydoc.plain(pydoc.render_doc(GPT.fit)) and model.fit.__self__ is model


def test_a_model_imports_the_loop_when_it_is_asked_for():
    code = "import sys, core.model as m; a = 'core.training.fit' in sys.modules; m.GPT.fit; "
    code += "print(a, 'core.training.fit' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
