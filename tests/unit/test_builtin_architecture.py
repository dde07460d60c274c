"""The built-in model's shape, its tokenizers, and its wiring, which must be SD3's own."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.builtin.architecture import BUILTIN, build_t5, build_transformer, build_vae
from deployments.builtin.conditioning import PromptEncoder, encode_tokens
from deployments.builtin.dequantise import dequantized_directory
from deployments.builtin.flow_sampler import sample_frames
from deployments.builtin.grammar_tokenizers import build_clip_tokenizer, build_t5_tokenizer
from deployments.builtin.pico import write_pico
from deployments.builtin.vocabulary import WRITTEN_WORDS, words

CLIP = build_clip_tokenizer(32)
T5 = build_t5_tokenizer(48)
PROMPTS = [
    'a large red circle left of a small blue square, the word "CAT" in green',
    "",
    "über 日本",
]


def test_the_transformer_is_sd35s_in_small_and_starts_by_predicting_nothing():
    transformer = build_transformer(BUILTIN)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert 20e6 < count < 24e6
    assert transformer.transformer_blocks[0].attn.norm_q is not None
    with torch.no_grad():
        output = transformer(
            hidden_states=torch.randn(1, 16, 8, 12),
            encoder_hidden_states=torch.randn(1, 5, BUILTIN.t5_width),
            pooled_projections=torch.randn(1, sum(BUILTIN.clip_widths)),
            timestep=torch.tensor([500.0]),
        ).sample
    assert output.shape == (1, 16, 8, 12)
    assert not output.any()


def test_the_autoencoder_has_sixteen_channels_at_an_eighth():
    vae = build_vae(BUILTIN, scaling_factor=1.5, shift_factor=0.1)
    assert 2.2e6 < sum(parameter.numel() for parameter in vae.parameters()) < 2.6e6
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 64, 96)).latent_dist.mode().shape == (1, 16, 8, 12)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5, 0.1)


def test_t5_knows_the_order_of_letters_before_any_training():
    torch.manual_seed(0)
    t5 = build_t5(BUILTIN, len(T5)).eval()
    ids = T5(['the word "TOP"', 'the word "POT"'], return_tensors="pt").input_ids
    with torch.no_grad():
        forward, backward = t5(ids)[0]
    letters = [T5.convert_ids_to_tokens(row.tolist()).index("O") for row in ids]
    assert letters == [4, 4]
    same_letter = torch.cosine_similarity(forward[4], backward[4], dim=0)
    # A bag of words would give the O of either word the same state.
    assert same_letter < 0.9
    with torch.no_grad():
        t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        forward, backward = t5(ids)[0]
    assert torch.cosine_similarity(forward[4], backward[4], dim=0) > 0.999


def test_every_grammar_word_is_one_token_of_both_tokenizers():
    for word in words():
        assert len(CLIP(word).input_ids) == 3, word
        assert len(T5(word).input_ids) == 2, word
        assert len(T5(word.capitalize()).input_ids) == 2, word


@pytest.mark.parametrize("word", WRITTEN_WORDS)
def test_t5_spells_written_words_letter_by_letter(word: str):
    tokens = T5.convert_ids_to_tokens(T5(f'the word "{word}"').input_ids)
    assert tokens == ["▁the", "▁word", '▁"', *word, '"', "</s>"]


@given(st.text(max_size=80))
@settings(deadline=None, max_examples=200)
def test_no_text_crashes_a_tokenizer_or_fakes_an_end_mark(text: str):
    for tokenizer, vocabulary in ((CLIP, len(CLIP)), (T5, len(T5))):
        ids = tokenizer(text, truncation=True, padding="max_length").input_ids
        assert len(ids) == tokenizer.model_max_length
        assert all(0 <= index < vocabulary for index in ids)


def test_unknown_characters_are_unknown_not_the_end():
    ids = CLIP("日本 cat").input_ids
    assert CLIP.unk_token_id in ids
    assert ids.count(CLIP.eos_token_id) == 1


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    folder = tmp_path_factory.mktemp("pico")
    plain = dequantized_directory(write_pico(folder / "fp8"), folder / "plain", torch.float32)
    loaded = StableDiffusion3Pipeline.from_pretrained(plain, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _parts_of(pipeline: StableDiffusion3Pipeline):
    from deployments.builtin.architecture import Parts

    return Parts(
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.text_encoder_3,
    ).eval()


def test_training_conditions_as_the_pipeline_does(pipeline: StableDiffusion3Pipeline):
    encoder = PromptEncoder(pipeline.tokenizer, pipeline.tokenizer_3, 32, 48)
    tokens = encoder.tokens(PROMPTS)
    with torch.no_grad():
        embeds, pooled = encode_tokens(_parts_of(pipeline), tokens.clip, tokens.t5)
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=48
        )
    torch.testing.assert_close(embeds, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_the_training_sampler_draws_what_the_pipeline_draws(pipeline: StableDiffusion3Pipeline):
    encoder = PromptEncoder(pipeline.tokenizer, pipeline.tokenizer_3, 32, 48)
    frames = sample_frames(
        _parts_of(pipeline), pipeline.vae, encoder, PROMPTS[:1], height=64, width=96, steps=4
    )
    noise = torch.randn((1, 16, 8, 12), generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        PROMPTS[0],
        height=64,
        width=96,
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=48,
        latents=noise,
        output_type="pt",
    ).images
    torch.testing.assert_close(frames.float() / 255, expected, atol=1.5 / 255, rtol=0)


def test_tokenizers_survive_saving(tmp_path: Path):
    for name, tokenizer in (("clip", CLIP), ("t5", T5)):
        tokenizer.save_pretrained(str(tmp_path / name))
        loaded = type(tokenizer).from_pretrained(str(tmp_path / name))
        for prompt in PROMPTS:
            assert loaded(prompt).input_ids == tokenizer(prompt).input_ids
        assert loaded.model_max_length == tokenizer.model_max_length
