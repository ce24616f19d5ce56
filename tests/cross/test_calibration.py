# SPDX-License-Identifier: MIT
"""Statistics of tiny models: compared with autograd and numpy, under GGUF names, from the cache,
and what is said where there are none. One file, since all tests share models and their caches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from entrollm_gguf import codec, runtime
from entrollm_gguf.calibrate import gather, read_imatrix
from entrollm_gguf.calibrate.cache import Gathered, ModuleStatistics
from entrollm_gguf.calibrate.model import CONTEXT, checkpoint_shapes
from entrollm_gguf.cli import main
from entrollm_gguf.convert.basis import Calibration
from entrollm_gguf.convert.calibrated import to_gguf
from entrollm_gguf.convert.llama_cpp import SourceModel, evaluate
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.errors import ConversionError, FormatError
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import open_model

gather_module = sys.modules[gather.__module__]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing from earlier runs; and one thread: two that wait for each other take ten times as
    long on cores that are busy."""
    import torch

    monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "cache")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path, text_file):
    """A short text."""
    path = tmp_path / "text.txt"
    path.write_text(text_file.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return path


CONTEXT_HERE = 256  # positions of tiny models; fewer than CONTEXT


def load(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_against_autograd(tiny_model, text, tmp_path, name):
    """Inputs by hooks of our own; gradients by a bias for every token."""
    import torch

    folder = tiny_model(name).folder
    found = gather(folder, text, n_sequences=2)
    tokens = torch.from_numpy(np.load(next((tmp_path / "cache").rglob("tokens.npy"))))
    assert CONTEXT > CONTEXT_HERE and tokens.shape == (2, CONTEXT_HERE) and found.source.endswith(f"2 x {CONTEXT_HERE} tokens")
    model = load(folder)
    layer, weight, words = model.model.layers[1].mlp.down_proj, "model.layers.1.mlp.down_proj.weight", model.model.embed_tokens
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()[0]))
    generator, total = torch.Generator().manual_seed(0), torch.zeros(layer.out_features)
    of_words, scale = torch.zeros(words.num_embeddings), getattr(words, "embed_scale", 1.0)
    for sequence in tokens:
        logits = model(sequence[None]).logits[0]
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)[:, 0]
        # the gradient by the outputs equals that by a bias; the gradient by a row of the embedding
        # equals that by what is added where the row is looked up
        bias = torch.nn.Parameter(torch.zeros(CONTEXT_HERE, layer.out_features))
        row = torch.nn.Parameter(torch.zeros(CONTEXT_HERE, words.embedding_dim))
        handles = [
            layer.register_forward_hook(lambda module, args, output, bias=bias: output + bias),
            words.register_forward_hook(lambda module, args, output, row=row: output + row * scale),
        ]
        loss = torch.nn.functional.cross_entropy(model(sequence[None]).logits[0], drawn, reduction="sum")
        loss.backward()
        total += bias.grad.square().sum(0)
        of_words.index_add_(0, sequence, row.grad.square().mean(-1))
        for handle in handles:
            handle.remove()
    x = torch.cat([seen[0], seen[2]])  # the runs without the bias
    one = found.modules[weight]
    assert np.allclose(one.columns, x.square().mean(0), rtol=1e-4, atol=1e-9)
    assert np.allclose(np.load(one.hessian), (x.T @ x / len(x)).numpy(), rtol=1e-3, atol=1e-5)
    assert np.allclose(one.rows, total.numpy() / len(x), rtol=1e-2, atol=1e-9)
    # layers that read the same input share its Hessian
    q, k, o = (found.modules[f"model.layers.0.self_attn.{part}_proj.weight"].hessian for part in "qko")
    assert q == k != o
    embedding = found.modules["model.embed_tokens.weight"]
    tied = name == "gemma3"
    assert (embedding.hessian == found.modules["lm_head.weight"].hessian) == tied
    mentioned = np.zeros(len(embedding.rows), bool)
    mentioned[tokens.unique().numpy()] = True
    assert (embedding.rows[mentioned] > 0).all() and (tied or not embedding.rows[~mentioned].any())
    head = found.modules["lm_head.weight"]
    looked_up = (embedding.rows - head.rows) * head.columns.mean() if tied else embedding.rows
    assert np.allclose(looked_up, of_words.numpy() / tokens.numel(), rtol=2e-2, atol=1e-4 * float(looked_up.max()))


def test_rows_and_columns_under_gguf_names(tiny_model, tmp_path):
    """Each weight's value says where it belongs: llama.cpp's order of rows is not the checkpoint's
    (rotary halves)."""
    folder = tiny_model("llama").folder
    weights: dict[str, np.ndarray] = {}
    SourceModel(folder).each_tensor(lambda name, data, _: weights.__setitem__(name, evaluate(data).astype(np.float32)))
    state = load(folder).state_dict()
    hessian = tmp_path / "h.npy"
    modules = {}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        w = state[name].numpy()
        modules[name] = ModuleStatistics(np.abs(w).mean(axis=0), np.abs(w).mean(axis=1), hessian)
    np.save(hessian, np.diag(modules["model.layers.0.self_attn.q_proj.weight"].columns))
    statistics = to_gguf(Gathered("test", modules), SourceModel(folder))
    assert statistics.tensors.keys() == {"blk.0.attn_q.weight", "blk.1.ffn_up.weight"}
    for name, one in statistics.tensors.items():
        assert np.allclose(one.rows[0], np.abs(weights[name]).mean(axis=1), rtol=1e-5)
        assert np.allclose(one.columns[0], np.abs(weights[name]).mean(axis=0), rtol=1e-5)
    changed = np.abs(state["model.layers.0.self_attn.q_proj.weight"].numpy()).mean(axis=1)
    assert not np.allclose(statistics.tensors["blk.0.attn_q.weight"].rows[0], changed)  # the order did change
    assert statistics.tensors["blk.0.attn_q.weight"].hessians == (hessian,)
    assert statistics.tensors["blk.1.ffn_up.weight"].hessians is None  # a Hessian of other inputs
    np.save(hessian, np.eye(7, dtype=np.float32))  # of another shape
    assert to_gguf(Gathered("test", modules), SourceModel(folder)).tensors["blk.0.attn_q.weight"].hessians is None
    with pytest.raises(ConversionError, match="names of the weights"):
        to_gguf(Gathered("test", {"other": next(iter(modules.values()))}), SourceModel(folder))


def test_experts_are_stacked(tiny_model, text, tmp_path):
    folder = tiny_model("qwen2_moe").folder
    statistics = to_gguf(gather(folder, text, n_sequences=1), SourceModel(folder))
    one = statistics.tensors["blk.1.ffn_down_exps.weight"]
    assert one.columns.shape == (4, 96) and one.rows.shape == (4, 64) and len(set(one.hessians)) == 4


def test_an_expert_counts_by_its_share_once(tiny_model, text, tmp_path):
    """Inputs are means over the tokens that reached the expert, gradients over all: their product
    contains the share of tokens once."""
    import torch

    folder = tiny_model("qwen2_moe").folder
    found = gather(folder, text, n_sequences=2)
    tokens = torch.from_numpy(np.load(next((tmp_path / "cache").rglob("tokens.npy"))))
    model = load(folder)
    layer, name = model.model.layers[0].mlp.experts[1].up_proj, "model.layers.0.mlp.experts.1.up_proj.weight"
    inputs, gradients = [], []

    def hook(module, args, output):
        inputs.append(args[0].detach())
        output.register_hook(lambda gradient: gradients.append(gradient))

    layer.register_forward_hook(hook)
    generator = torch.Generator().manual_seed(0)
    for sequence in tokens:
        logits = model(sequence[None]).logits[0]
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    x, g = torch.cat(inputs), torch.cat(gradients)
    assert 0 < len(x) < 0.9 * tokens.numel()
    one = found.modules[name]
    assert np.allclose(one.columns, x.square().mean(0), rtol=1e-3)
    assert np.allclose(np.diagonal(np.load(one.hessian)), one.columns, rtol=1e-3)
    assert np.allclose(one.rows, g.square().sum(0).numpy() / tokens.numel(), rtol=1e-2, atol=1e-9)


def test_experts_that_no_token_came_to(tiny_model, text, tmp_path, monkeypatch):
    """They have no statistics of their own, and are quantized like the others."""
    import torch

    folder = tiny_model("qwen2_moe").folder
    opened = gather_module.open_model

    def without_the_last_expert(*arguments):
        model, tokenizer = opened(*arguments)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor([3]), -1e9))
        return model, tokenizer

    monkeypatch.setattr(gather_module, "open_model", without_the_last_expert)
    out = tmp_path / "out.gguf"
    report = convert_model(folder, out, bits=5, calibration=Calibration(text=text, n_sequences=1))
    statistics = to_gguf(gather(folder, text, n_sequences=1), SourceModel(folder))
    one = statistics.tensors["blk.0.ffn_up_exps.weight"]
    assert not one.columns[3].any() and one.columns[:3].any(axis=1).all()
    assert one.hessians[3] is None and np.array_equal(np.diagonal(one.hessian(3)), one.columns[:3].mean(axis=0))
    assert not list((tmp_path / "cache").rglob("hessian-*experts.3.*"))
    scheme = next(t.scheme for t in report.tensors if t.name == "blk.0.ffn_up_exps.weight")
    assert "feedback" in scheme
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        coded = next(t for t in open_model(out).tensors() if t.name == name)
        payload = codec.Payload(coded.kind, coded.data, coded.shape)
        codes = payload.codes()
        scales, _ = payload.scales_and_offsets()
        assert codes[3].std() > 0.5 * codes[:3].std()
        assert (scales[3] > 0).all() and np.median(scales[3]) > 0.2 * np.median(scales[:3])


@pytest.fixture(scope="module")
def with_pictures(tiny_model, tmp_path_factory):
    """A text model inside one that also reads pictures."""
    import torch
    import transformers

    plain, folder = tiny_model("gemma3").folder, tmp_path_factory.mktemp("with-pictures")
    text = transformers.AutoConfig.from_pretrained(plain)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(plain / name, folder / name)
    return folder


def test_a_model_of_text_and_pictures(with_pictures, text, tmp_path):
    """The names are the converter's; the part that sees pictures takes neither memory nor disk."""
    names = SourceModel(with_pictures).names()
    found = gather(with_pictures, text, n_sequences=1, names=names)
    assert not any("vision" in name or "language_model" in name for name in found.modules)
    assert not list((tmp_path / "cache").rglob("hessian-*vision*"))
    statistics = to_gguf(found, SourceModel(with_pictures))
    assert {"token_embd.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"} <= statistics.tensors.keys()


def test_unknown_names_are_told_before_the_runs(tiny_model, text):
    runs = []
    with pytest.raises(ConversionError, match="names of the weights"):
        gather(tiny_model("llama").folder, text, names={"other.weight"}, progress=lambda *what: runs.append(what))
    assert not runs


def test_own_text_is_what_the_model_writes(tiny_model, tmp_path):
    """Documents end within it, and the folder's settings for generation do not apply."""
    import torch
    import transformers

    model = load(tiny_model("llama").folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama").folder)
    end = tokenizer.eos_token_id
    model.lm_head.register_forward_hook(
        lambda module, args, output: output + 4.0 * torch.nn.functional.one_hot(torch.tensor(end), output.shape[-1])
    )

    def write():
        return gather_module.own_text(model, tokenizer, 3, 40, 0, tmp_path, None)

    plain = write()
    assert plain.shape == (3, 40) and (plain == end).any() and len(set(plain[:, -5:].ravel())) > 5
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=end, repetition_penalty=50.0, min_p=0.5)
    assert np.array_equal(write(), plain)


def test_source_tells_what_was_read(tiny_model, text):
    """A short text gives fewer sequences than asked for. Afterwards the number of threads is
    torch's own again."""
    import torch

    before, threads, text_of_3 = torch.get_num_threads(), set(), text.with_name("three.txt")
    text_of_3.write_text(text.read_text(encoding="utf-8")[:3000], encoding="utf-8")

    def on_progress(done, total, what, unit):
        threads.add(torch.get_num_threads())

    found = gather(tiny_model("llama").folder, text_of_3, threads=3, progress=on_progress)
    n = int(found.source.rsplit(", ", 1)[1].split(" x ")[0])
    assert 1 <= n < 40 and n == len(np.load(next(next(iter(found.modules.values())).hessian.parent.glob("tokens.npy"))))
    assert threads == {3} and torch.get_num_threads() == before


def test_own_text_cache_and_resumption(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("llama").folder
    monkeypatch.setattr(gather_module, "GROUP_BYTES", 2_000_000)  # several runs
    runs = []

    class Stopped(Exception):
        pass

    def stop_later(done, total, what, unit):
        runs.append((what, unit))
        if what.startswith("calibrating") and done > total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        gather(folder, None, n_sequences=2, seed=5, threads=1, progress=stop_later)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("hessian-*.npy")}
    assert "hessian-model.layers.0.self_attn.q_proj.npy" in kept and ("writing text", "sequences") in runs
    broken = next((tmp_path / "cache").rglob(sorted(kept)[-1]))
    broken.write_bytes(broken.read_bytes()[:-4])  # as if the machine had stopped, too
    del kept[broken.name]
    monkeypatch.setattr(gather_module, "own_text", None)  # the text is there
    resumed = gather(folder, None, n_sequences=2, seed=5)
    assert all(path.stat().st_mtime_ns == kept[path.name] for path in (tmp_path / "cache").rglob("hessian-*.npy") if path.name in kept)
    monkeypatch.setattr(gather_module, "open_model", None)  # no model is loaded from here on
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))  # and there would be no room for one
    again = gather(folder, None, n_sequences=2, seed=5)
    assert again.modules.keys() == resumed.modules.keys() and again.source == resumed.source
    monkeypatch.undo()
    monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "other")
    fresh = gather(folder, None, n_sequences=2, seed=5, threads=1)  # in one run
    for name, one in fresh.modules.items():
        assert np.allclose(one.columns, resumed.modules[name].columns) and np.allclose(one.rows, resumed.modules[name].rows, rtol=1e-3)
        assert one.hessian is None or np.allclose(np.load(one.hessian), np.load(resumed.modules[name].hessian))


def test_a_damaged_cache_is_gathered_again(tiny_model, text, tmp_path):
    folder = tiny_model("llama").folder
    first = gather(folder, text, n_sequences=1)
    cache = next((tmp_path / "cache").rglob("complete.json")).parent
    hessian = first.modules["model.layers.0.mlp.down_proj.weight"].hessian
    wanted = np.load(hessian)

    def other_shape():
        np.save(hessian, wanted[:-1])

    for damage in (
        lambda: (cache / "complete.json").write_text("{"),
        lambda: (cache / "complete.json").write_text("[]"),
        lambda: (cache / "diagonals.npz").write_bytes((cache / "diagonals.npz").read_bytes()[:1000]),
        lambda: (cache / "diagonals.npz").unlink(),
        lambda: hessian.write_bytes(b""),
        other_shape,
        lambda: [path.unlink() for path in cache.iterdir() if path.name != "complete.json"],
    ):
        damage()
        (cache / "part-1-of-another.npy").write_bytes(b"left behind")
        again = gather(folder, text, n_sequences=1)
        assert np.allclose(np.load(hessian), wanted, rtol=1e-4, atol=1e-6)
        assert all(np.allclose(one.columns, first.modules[name].columns, rtol=1e-4) for name, one in again.modules.items())
        assert not list(cache.glob("part-*"))


def test_two_at_a_time_gather_once(tiny_model, text, monkeypatch):
    folder, opened, calls = tiny_model("mistral").folder, gather_module.open_model, []
    monkeypatch.setattr(gather_module, "open_model", lambda *arguments: (calls.append(1), opened(*arguments))[1])
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: gather(folder, text, n_sequences=1), range(2))
    assert len(calls) == 1 and one.source == two.source


def test_no_room_in_the_cache(tiny_model, text, tmp_path, monkeypatch):
    """One line that names the folder and what to set; nothing half-written is left."""
    folder = tiny_model("mistral").folder

    def full(file, array):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    for name, replacement, words in (
        ("shutil.disk_usage", lambda _: SimpleNamespace(free=1000), "GB"),
        ("numpy.save", full, "No space left"),
        ("numpy.savez", lambda file, **arrays: full(file, None), "No space left"),
    ):
        monkeypatch.setattr(name, replacement)
        with pytest.raises(ConversionError, match=f"(?s)cache/calibration/.*{words}.*ENTROLLM_CACHE") as caught:
            gather(folder, text, n_sequences=1)
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("part-*")) and not list((tmp_path / "cache").rglob("complete.json"))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "file")
    with pytest.raises(ConversionError, match="ENTROLLM_CACHE"):
        gather(folder, text, n_sequences=1)


def test_where_the_model_runs(tiny_model, text, tmp_path, monkeypatch):
    """Weights are counted in the files that are loaded; a GPU that is too small is left alone; each
    precision has statistics of its own."""
    import torch

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama").folder, folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")  # which transformers does not load
    n_weights, widths = checkpoint_shapes(folder)
    assert n_weights == sum(p.numel() for p in load(folder).parameters()) and max(widths) == 1024 + 32
    full, half = gather_module.find_places(folder)
    assert (full.device, full.dtype, half.dtype) == ("cpu", "float32", "bfloat16")
    assert full.needed - half.needed == pytest.approx(2.4 * n_weights) and full.needed > 4.8 * n_weights + 2 * 4 * max(widths) ** 2
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=(full.needed + half.needed) / 2))
    in_half = gather(folder, text, n_sequences=1)
    monkeypatch.undo()
    monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    in_full = gather(folder, text, n_sequences=1)
    name = "model.layers.1.mlp.down_proj.weight"
    assert in_half.modules[name].hessian.parent != in_full.modules[name].hessian.parent
    assert np.allclose(in_half.modules[name].columns, in_full.modules[name].columns, rtol=0.2)
    # what else the statistics depend on
    before, where = gather_module._hash_files(folder), full
    keys = {gather_module._key(before, "x", 1, where)}
    (folder / "tokenizer.model").write_bytes(b"another")
    keys.add(gather_module._key(gather_module._hash_files(folder), "x", 1, where))
    monkeypatch.setattr("transformers.__version__", "4.0")
    keys.add(gather_module._key(before, "x", 1, where))
    assert len(keys) == 3


def test_what_the_model_raises_is_one_line(tiny_model, text, tmp_path, monkeypatch, capsys):
    """Whatever fails inside names the folder and what to do instead."""
    folder, out, opened = tiny_model("llama").folder, str(tmp_path / "out.gguf"), gather_module.open_model

    def failing(error, when):
        def hook(module, args, output):
            if module.training is False and args[0].requires_grad == when:
                raise error

        def open_it(*arguments):
            model, tokenizer = opened(*arguments)
            model.model.layers[1].mlp.down_proj.register_forward_hook(hook)
            return model, tokenizer

        return open_it

    for error, with_gradients, words in (
        (RuntimeError("shapes do not\nfit"), True, "RuntimeError: shapes do not fit"),
        (TypeError("no such argument"), False, "TypeError"),
        (MemoryError(), True, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False, "out of memory"),
    ):
        monkeypatch.setattr(gather_module, "open_model", failing(error, with_gradients))
        with pytest.raises(ConversionError) as caught:
            gather(folder, text, n_sequences=1)
        line = str(caught.value)
        assert str(folder) in line and words in line and "--imatrix" in line and "\n" not in line
    monkeypatch.setattr(gather_module, "open_model", opened)
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    config = json.loads((odd / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}}
    (odd / "config.json").write_text(json.dumps(config))
    (odd / "odd.py").write_text("raise SystemExit('must not run')")
    with pytest.raises(ConversionError, match="--imatrix"):
        gather(odd, text)
    assert main(["convert", str(folder), out, "--bits", "4", "--calibration", str(text), "--seed", str(2**64)]) != 0
    error = capsys.readouterr().err
    assert "--seed" in error and "Traceback" not in error


def test_fewer_positions_than_a_sequence(tiny_model, text):
    """Learned positions end: the model cannot read further."""
    folder = tiny_model("gpt2").folder
    assert gather(folder, text, n_sequences=1).source.endswith(f"1 x {CONTEXT_HERE} tokens")


def test_what_cannot_be_calibrated(tiny_model, text, tmp_path, monkeypatch, capsys):
    folder, out = str(tiny_model("llama").folder), str(tmp_path / "out.gguf")
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, words in (
        (["--bits", "4", "--calibration", str(short)], "tokens"),
        (["--bits", "4", "--calibration", str(binary)], "UTF-8"),
        (["--bits", "4", "--calibration", str(tmp_path / "none")], "none"),
        (["--recipe", "EQ8-paper", "--calibration", str(text)], "fixed grid"),
        (["--recipe", "EQ8-paper", "--dry-run"], "fixed grid"),
        (["--bits", "4", "--calibration", str(text), "--imatrix", str(text)], "not both"),
        (["--bits", "4", "--imatrix", str(text)], "not a GGUF"),
        (["--bits", "4", "--imatrix", str(tmp_path / "none")], "no such file"),
    ):
        assert main(["convert", folder, out, *arguments]) != 0
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConversionError, match="free memory"):
        gather(tiny_model("llama").folder, text)
    monkeypatch.undo()
    assert not (tmp_path / "out.gguf").exists()


def test_imatrix_files(tiny_model, converted, tmp_path, text_file, monkeypatch, capsys):
    """Made by llama-imatrix on our own file, read by the converter; experts that no token reached
    do no harm."""
    source, folder = converted("qwen2_moe", "EQ8-rows"), str(tiny_model("qwen2_moe").folder)
    imatrix = tmp_path / "imatrix.gguf"
    command = [runtime.tool("llama-imatrix"), "-m", source, "-f", text_file, "-o", imatrix, "-c", "64", "--chunks", "3"]
    subprocess.run(command, check=True, capture_output=True)
    statistics = read_imatrix(imatrix)
    assert statistics.tensors["blk.0.ffn_down_exps.weight"].columns.shape == (4, 96)
    assert all(np.isfinite(one.columns).all() for one in statistics.tensors.values())
    out = tmp_path / "out.gguf"
    report = convert_model(folder, out, bits=5, calibration=Calibration(imatrix=imatrix))
    assert 0.99 * 5 <= sum(t.n_bytes for t in report.tensors) * 8 / report.n_weights <= 5
    fields = import_gguf().GGUFReader(out).fields
    assert fields["entrollm.calibration"].contents() == statistics.source and "entrollm.fold_exponent" in fields
    assert main(["convert", folder, str(out), "--bits", "5", "--imatrix", str(imatrix), "--no-fold", "--force"]) == 0
    assert "entrollm.fold_exponent" not in import_gguf().GGUFReader(out).fields
    # only what is wanted is read
    nothing = SimpleNamespace(tensors=[SimpleNamespace(name="blk.0.attn_q.weight")])  # whose data would be gigabytes
    with monkeypatch.context() as patched, pytest.raises(FormatError, match="no importance values"):
        patched.setattr(import_gguf(), "GGUFReader", lambda path: nothing)
        read_imatrix(imatrix)
    # cut short, and of another model
    (tmp_path / "cut.gguf").write_bytes(imatrix.read_bytes()[:-500])
    with pytest.raises(FormatError, match="cut short"):
        read_imatrix(tmp_path / "cut.gguf")
    with pytest.raises(FormatError, match="no importance values"):
        read_imatrix(source)
    for other, words in (("llama", "another model"), ("gpt2", "another model")):
        assert main(["convert", str(tiny_model(other).folder), str(tmp_path / "x.gguf"), "--bits", "5", "--imatrix", str(imatrix)]) != 0
        assert words in capsys.readouterr().err


def divergence(reference, other) -> float:
    """Mean KL divergence of predictions, from logits, nats."""
    p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1, keepdims=True) for x in (reference, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_calibration_makes_it_better(tiny_model, text, text_file, tmp_path, name):
    """On such text the file is closer to the float model than one of the same size without
    calibration. Each run gives the same bytes, and the bits that were asked for."""
    import torch
    import transformers
    from running import logits

    folder = tiny_model(name).folder
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text_file.read_text(encoding="utf-8")[50_000:51_000]).input_ids
    tokens = tuple(ids[:48])
    with torch.inference_mode():
        reference = load(folder)(torch.tensor([tokens])).logits[0].numpy()
    errors = {}
    for kind, calibration in (
        ("without", None),
        ("with", Calibration(text=text, n_sequences=4)),
        ("again", Calibration(text=text, n_sequences=4)),
    ):
        out = tmp_path / f"{kind}.gguf"
        report = convert_model(folder, out, bits=4, calibration=calibration)
        assert 0.985 * 4 <= sum(t.n_bytes for t in report.tensors) * 8 / report.n_weights <= 4
        errors[kind] = divergence(reference, logits(out, tokens)[:, : reference.shape[1]])
    assert errors["with"] < errors["without"]
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert any("feedback" in t.scheme for t in report.tensors)
