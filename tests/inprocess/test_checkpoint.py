"""Loading: what fits is loaded as it is stored; what does not is refused by name.

Each test changes one thing in a copy of pico's files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.builtin.dequantise import dequantized_directory
from deployments.payloads import TextJob
from deployments.sd3.fp8 import Fp8Linear, quantize_per_channel
from deployments.sd3.linear import stacked
from deployments.sd3.mmdit import Mmdit, load_transformer
from deployments.sd3.precision import PrecisionChoice, as_choice
from deployments.sd3.text import TextEncoders
from deployments.sd3.vae import VaeDecoder
from serve.errors import ConfigurationError
from tests.inprocess.pico_folder import pico_as_stored

FILE = Path("transformer/diffusion_pytorch_model.safetensors")
LINEAR = "transformer_blocks.0.attn.to_q.weight"
PLAIN = "context_embedder.weight"
FP8_IN_FLOAT32 = PrecisionChoice("fp8", "fp8", torch.float32, "for a test")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_as_stored(tmp_path_factory.mktemp("model") / "pico")


@pytest.fixture
def model_dir(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "pico"))


def change(model_dir: Path, by: Callable[[State], object]) -> None:
    """Rewrite the transformer's file; afterwards it is one file without an index."""
    state = load_file(model_dir / FILE)
    by(state)
    save_file(state, model_dir / FILE)


def velocity(mmdit: Mmdit) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return mmdit.velocity(
        torch.randn(2, mmdit.in_channels, 8, 8, generator=generator),
        torch.tensor([0.8, 0.2]),
        torch.randn(2, 7, mmdit.joint_attention_dim, generator=generator),
        torch.randn(2, mmdit.pooled_projection_dim, generator=generator),
    )


def loaded(model_dir: Path, precision: PrecisionChoice | str) -> torch.nn.Module:
    device = torch.device("cpu")
    model: torch.nn.Module = load_transformer(model_dir, device, as_choice(precision, device))
    return model


def fp8_layers(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)]


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_fp8_files_stay_fp8_in_memory(model_dir, precision):
    mmdit = Mmdit.load(model_dir, "cpu", precision)
    stored = load_file(model_dir / FILE)
    in_file = {
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if tensor.dtype == torch.float8_e4m3fn
    }
    assert set(fp8_layers(loaded(model_dir, precision))) == in_file
    assert len(in_file) > 20
    fp8_bytes = sum(stored[f"{name}.weight"].numel() for name in in_file)
    assert (
        fp8_bytes
        <= mmdit.resident_bytes
        < fp8_bytes
        + 2
        * sum(
            2 * tensor.numel() for tensor in stored.values() if tensor.dtype != torch.float8_e4m3fn
        )
    )
    assert fp8_layers(TextEncoders.load(model_dir, "cpu", precision).t5[0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_fp8_files_are_dequantised_where_asked(model_dir, precision, dtype):
    model = loaded(model_dir, precision)
    assert not fp8_layers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = load_file(model_dir / FILE)
    expected = stored[LINEAR].float() * stored[LINEAR + "_scale"][:, None]
    assert torch.equal(model.get_parameter(LINEAR), expected.to(dtype))


def test_an_ordinary_directory_is_quantised_for_fp8(model_dir, tmp_path):
    plain = dequantized_directory(model_dir, tmp_path / "plain", torch.float32)
    model = loaded(plain, FP8_IN_FLOAT32)
    blocks = [
        name
        for name, layer in model.named_modules()
        if name.startswith("transformer_blocks.") and hasattr(layer, "in_features")
    ]
    assert fp8_layers(model) == blocks
    # Quantising what was dequantised finds the same codes again.
    ours, theirs = (Mmdit.load(each, "cpu", FP8_IN_FLOAT32) for each in (plain, model_dir))
    assert torch.allclose(velocity(ours), velocity(theirs), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_ordinary_directory_loads_as_it_is(model_dir, tmp_path, dtype):
    plain = dequantized_directory(model_dir, tmp_path / "plain", dtype)
    mmdit = Mmdit.load(plain, "cpu", "bf16")
    assert not fp8_layers(loaded(plain, "bf16"))
    assert torch.isfinite(velocity(mmdit)).all()
    decoder = VaeDecoder.load(plain, "cpu", "bf16")
    assert decoder.decode(torch.zeros(decoder.channels, 4, 4)).shape == (32, 32, 3)


def _scalar(state: State) -> None:
    whole = state[LINEAR].float() * state[LINEAR + "_scale"][:, None]
    scale = whole.abs().max() / 448
    state[LINEAR] = (whole / scale).to(torch.float8_e4m3fn)
    state[LINEAR + "_scale"] = scale


def _column(state: State) -> None:
    state[LINEAR + "_scale"] = state[LINEAR + "_scale"][:, None].contiguous()


def _bare_cast(state: State) -> None:
    state[LINEAR] = (state[LINEAR].float() * state.pop(LINEAR + "_scale")[:, None]).to(
        torch.float8_e4m3fn
    )


def _outside_the_blocks(state: State) -> None:
    state[PLAIN], state[PLAIN + "_scale"] = quantize_per_channel(state[PLAIN])


@pytest.mark.parametrize("form", [_scalar, _column, _bare_cast, _outside_the_blocks])
def test_other_forms_of_fp8_are_read(model_dir, form):
    exact = velocity(Mmdit.load(model_dir, "cpu", "fp32"))
    change(model_dir, form)
    for precision in ("fp32", FP8_IN_FLOAT32):
        error = (velocity(Mmdit.load(model_dir, "cpu", precision)) - exact).norm() / exact.norm()
        assert error < 0.05


INPUT_SCALE = "transformer_blocks.0.attn.to_q.input_scale"
FP8_PRODUCTS = PrecisionChoice("fp8", "fp8", torch.bfloat16, "for a test", "scaled_mm")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_static_scale_comes_with_its_layer(model_dir, shape):
    change(model_dir, lambda state: state.update({INPUT_SCALE: torch.full(shape, 0.25)}))
    model = loaded(model_dir, FP8_IN_FLOAT32)
    found = {
        name: layer.input_scale
        for name, layer in model.named_modules()
        if isinstance(layer, Fp8Linear) and layer.input_scale is not None
    }
    assert found == {INPUT_SCALE.removesuffix(".input_scale"): torch.tensor(0.25)}


def test_static_scales_are_used_where_products_are_fp8_and_nowhere_else(model_dir):
    precisions = (FP8_PRODUCTS, FP8_IN_FLOAT32, "fp32")
    before = [velocity(Mmdit.load(model_dir, "cpu", precision)) for precision in precisions]

    def scale_all(state: State) -> None:
        linears = [name for name in state if name.endswith(".weight_scale")]
        for name in linears:
            state[name.replace(".weight_scale", ".input_scale")] = torch.tensor(2e-4)

    change(model_dir, scale_all)
    after = [velocity(Mmdit.load(model_dir, "cpu", precision)) for precision in precisions]
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [False, True, True]


def test_modulation_weights_are_stacked_without_a_copy(model_dir):
    """They are a third of a model: a copy would be the peak of loading."""
    model: Any = loaded(model_dir, FP8_PRODUCTS)
    layers = [
        layer
        for block in model.transformer_blocks
        for layer in (block.norm1.linear, block.norm1_context.linear)
    ]
    whole = stacked(layers)
    assert isinstance(whole, Fp8Linear)
    assert whole.weight_fp8.data_ptr() == layers[0].weight_fp8.data_ptr()
    rows = torch.cat([layer.weight_fp8.view(torch.uint8) for layer in layers])
    assert torch.equal(whole.weight_fp8.view(torch.uint8), rows)
    scales = torch.cat([layer.weight_scale for layer in layers])
    assert torch.equal(whole.weight_scale, scales)
    # Others, which lie elsewhere, are copied.
    few = stacked([layers[0], layers[2]])
    assert isinstance(few, Fp8Linear)
    assert few.weight_fp8.data_ptr() != layers[0].weight_fp8.data_ptr()


def test_shards_with_an_index_load_like_one_file(model_dir):
    exact = velocity(Mmdit.load(model_dir, "cpu", "fp32"))
    _shard(model_dir)
    assert torch.equal(velocity(Mmdit.load(model_dir, "cpu", "fp32")), exact)


def _shard(model_dir: Path) -> Path:
    state = load_file(model_dir / FILE)
    (model_dir / FILE).unlink()
    names = sorted(state)
    groups = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, group in groups.items():
        save_file({name: state[name] for name in group}, model_dir / "transformer" / file)
    weight_map = {name: file for file, group in groups.items() for name in group}
    index = model_dir / "transformer" / (FILE.name + ".index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def _missing(state: State) -> None:
    del state[LINEAR]
    del state[LINEAR + "_scale"]


def _stranger(state: State) -> None:
    state["transformer_blocks.9.attn.to_q.weight"] = torch.zeros(2)


def _shape(state: State) -> None:
    state[PLAIN] = torch.zeros(3, 4)


def _dtype(state: State) -> None:
    state[PLAIN] = state[PLAIN].to(torch.int8)


def _nan(state: State) -> None:
    state[PLAIN][1, 2] = float("nan")


def _fp8_nan(state: State) -> None:
    state[LINEAR].view(torch.uint8)[0, 0] = 0xFF


def _scale_shape(state: State) -> None:
    state[LINEAR + "_scale"] = torch.ones(3)


def _scale_zero(state: State) -> None:
    state[LINEAR + "_scale"][0] = 0


def _scale_huge(state: State) -> None:
    state[LINEAR + "_scale"][0] = 3e38


def _scale_of_nothing(state: State) -> None:
    state[LINEAR] = state[LINEAR].to(torch.float16)


def _input_scale(name: str, value: Tensor) -> Callable[[State], None]:
    def damage(state: State) -> None:
        state[name] = value

    return damage


STRANGE = "transformer_blocks.9.attn.to_q.input_scale"
NO_LINEAR = "pos_embed.proj.input_scale"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing, ["lacks tensor", LINEAR]),
        (_stranger, ["no place for", "transformer_blocks.9.attn.to_q.weight", FILE.name]),
        (_shape, [PLAIN, FILE.name, "[3, 4]", "expects ["]),
        (_dtype, [PLAIN, FILE.name, "int8", "float8_e4m3fn"]),
        (_nan, [PLAIN, FILE.name, "NaN"]),
        (_fp8_nan, [LINEAR, FILE.name, "NaN"]),
        (_scale_shape, [LINEAR + "_scale", FILE.name, "[3]"]),
        (_scale_zero, [LINEAR + "_scale", FILE.name, "positive"]),
        (_scale_huge, [LINEAR + "_scale", FILE.name, "3e+38", "infinite"]),
        (_scale_of_nothing, [LINEAR, "float16", "float8_e4m3fn"]),
        (_input_scale(INPUT_SCALE, torch.ones(3)), [INPUT_SCALE, FILE.name, "[3]", "[1]"]),
        (_input_scale(INPUT_SCALE, torch.ones(()).half()), [INPUT_SCALE, "float16", "float32"]),
        (_input_scale(INPUT_SCALE, torch.tensor(0.0)), [INPUT_SCALE, FILE.name, "positive"]),
        (_input_scale(INPUT_SCALE, torch.tensor(-1.0)), [INPUT_SCALE, "-1", "positive"]),
        (_input_scale(INPUT_SCALE, torch.tensor(1e-42)), [INPUT_SCALE, "positive"]),
        (_input_scale(INPUT_SCALE, torch.tensor(torch.inf)), [INPUT_SCALE, "inf", "finite"]),
        (_input_scale(INPUT_SCALE, torch.tensor([torch.nan])), [INPUT_SCALE, "nan", "finite"]),
        (_input_scale(STRANGE, torch.ones(())), [STRANGE, "no place for"]),
        (_input_scale(NO_LINEAR, torch.ones(())), [NO_LINEAR, "no place for"]),
    ],
)
def test_what_does_not_fit_is_named(model_dir, damage, said):
    change(model_dir, damage)
    with pytest.raises(ConfigurationError) as caught:
        Mmdit.load(model_dir, "cpu", "auto")
    for words in said:
        assert words in caught.value.message


def _no_config(model_dir: Path) -> None:
    (model_dir / "transformer" / "config.json").unlink()


def _broken_config(model_dir: Path) -> None:
    (model_dir / "transformer" / "config.json").write_text("{")


def _impossible_config(model_dir: Path) -> None:
    path = model_dir / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": "many"}))


def _no_weights(model_dir: Path) -> None:
    (model_dir / FILE).unlink()


def _truncated(model_dir: Path) -> None:
    data = (model_dir / FILE).read_bytes()
    (model_dir / FILE).write_bytes(data[: len(data) // 2])


def _pickle_only(model_dir: Path) -> None:
    (model_dir / FILE).rename(model_dir / "transformer" / "diffusion_pytorch_model.bin")


def _shard_gone(model_dir: Path) -> None:
    _shard(model_dir)
    (model_dir / "transformer" / "b.safetensors").unlink()


def _index_reaches_out(model_dir: Path) -> None:
    _shard(model_dir).write_text(json.dumps({"weight_map": {LINEAR: "../../b.safetensors"}}))


def _index_promises_too_much(model_dir: Path) -> None:
    index = _shard(model_dir)
    written = json.loads(index.read_text())
    written["weight_map"]["ghost"] = "a.safetensors"
    index.write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_config, "config.json"),
        (_broken_config, "config.json"),
        (_impossible_config, "config.json"),
        (_no_weights, "no weights"),
        (_truncated, FILE.name),
        (_pickle_only, "no weights"),
        (_shard_gone, "b.safetensors"),
        (_index_reaches_out, "not beside it"),
        (_index_promises_too_much, "ghost"),
    ],
)
def test_damaged_folders_are_refused(model_dir, damage, said):
    damage(model_dir)
    with pytest.raises(ConfigurationError) as caught:
        Mmdit.load(model_dir, "cpu", "auto")
    assert said in caught.value.message
    assert caught.value.field == "model.path"


@pytest.mark.parametrize("alias", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_tied_weight_may_be_stored_under_either_name(model_dir, alias):
    job = TextJob("a red circle", "a red circle", "a red circle", 16)
    exact = TextEncoders.load(model_dir, "cpu", "fp32").encode([job])[0].prompt_embeds
    file = model_dir / "text_encoder_3" / "model.safetensors"
    state = load_file(file)
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name not in ("shared.weight", "encoder.embed_tokens.weight")
    }
    (embedding,) = (tensor for name, tensor in state.items() if name not in kept)
    save_file(kept | {alias: embedding}, file)
    ours = TextEncoders.load(model_dir, "cpu", "fp32").encode([job])[0].prompt_embeds
    assert (ours == exact).all()
    assert (exact[32:] != 0).any()


def test_weights_no_longer_need_their_files(model_dir):
    mmdit = Mmdit.load(model_dir, "cpu", "auto")
    before = velocity(mmdit)
    change(model_dir, lambda state: [tensor.view(torch.uint8).zero_() for tensor in state.values()])
    assert torch.equal(velocity(mmdit), before)
