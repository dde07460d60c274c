"""The module that weights are loaded into has diffusers' names and shapes, without diffusers."""

import pytest
import torch

from deployments.sd3.stored_transformer import StoredTransformer, TransformerConfig
from loadtest.sd35 import MODELS, config, empty_transformer


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_diffusers_own(name):
    with torch.device("meta"):
        ours = StoredTransformer(TransformerConfig.of(config(name)))
    theirs = empty_transformer(name).state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.items()
    }


def test_what_a_configuration_leaves_out_has_diffusers_defaults():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        theirs = SD3Transformer2DModel()
    ours = TransformerConfig.of({})
    assert {name: theirs.config[name] for name in vars(ours)} == vars(ours)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_layers": 0},
        {"num_layers": "38"},
        {"patch_size": True},
        {"attention_head_dim": None},
        {"in_channels": 1.5},
        {"qk_norm": "layer_norm"},
    ],
)
def test_a_configuration_of_no_transformer_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransformerConfig.of(config("tiny") | wrong)
