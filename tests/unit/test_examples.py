# SPDX-License-Identifier: MIT
"""Public functions and classes show by an example how they are used, and every example runs.

An example sees the names of the module that its function is from. It runs in a folder that holds a
tiny model: as a Hugging Face folder `model`, as `model.gguf` (EQ8-rows) and, decoded, as
`plain.gguf`; beside it lies an English text, `text.txt`.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import shutil
import sys

import pytest

from entrollm_gguf import decode_file

DOORS = ("", ".codec", ".quant", ".gguf_io.reader", ".convert", ".inspect", ".eval")

RESULTS = "holds a result: the example is that of the function that returns it"
ERRORS = "an error: raised in no other way than the ones that examples show"
WITHOUT = {
    "build_runtime": "compiles for minutes",
    "run_demo": "works for minutes",
    **dict.fromkeys(("CodePlan", "CodeUsage", "Encoded", "SlabHeader"), RESULTS),
    **dict.fromkeys(("Profile", "Quantized", "ModelFile", "TensorEntry"), RESULTS),
    **dict.fromkeys(("ConversionReport", "DecodeReport", "FileReport", "TensorReport", "VerifyReport", "PerplexityResult"), RESULTS),
    **dict.fromkeys(("CodecError", "NotFiniteError", "QuantizeError"), ERRORS),
}


def public() -> dict[str, object]:
    """Functions and classes of all doors, by name."""
    found: dict[str, object] = {}
    for door in DOORS:
        module = importlib.import_module(f"entrollm_gguf{door}")
        own = [name for name, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            one = getattr(module, name)
            if not name.startswith("_") and (inspect.isfunction(one) or inspect.isclass(one)):
                assert found.setdefault(name, one) is one, f"two things are called {name}"
    return found


PUBLIC = public()


def examples_of(name: str) -> list[doctest.DocTest]:
    """A function's examples, or those of a class and of each of its methods."""
    module = sys.modules[PUBLIC[name].__module__]
    found = doctest.DocTestFinder().find(PUBLIC[name], name, module, vars(module).copy())
    return [test for test in found if test.examples]


@pytest.fixture(scope="module")
def models(tmp_path_factory, converted, tiny_model, text_file):
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny_model("mistral").folder, folder / "model")
    shutil.copyfile(converted("mistral", "EQ8-rows"), folder / "model.gguf")
    shutil.copyfile(text_file, folder / "text.txt")
    decode_file(folder / "model.gguf", folder / "plain.gguf")
    return folder


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in WITHOUT])
def test_example(name, models, tmp_path, monkeypatch):
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    tests = examples_of(name)
    assert name in (test.name for test in tests), f"{name} has no example in its docstring"
    for test in tests:
        said: list[str] = []
        failed, tried = doctest.DocTestRunner().run(test, out=said.append)
        assert failed == 0 and tried == len(test.examples), "".join(said)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_name_without_an_example_has_none(name):
    assert not examples_of(name), f"{name} has an example: take it from the list"
