"""The Stable Diffusion example of PEFT's Bone documentation, on a tiny pipeline of that shape, and diffusers' own ways in."""

import string

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bonetune import VARIANTS, BoneConfig, BoneConv, BoneLayer, BoneModel
from bonetune.ops import Update, merge

diffusers = pytest.importorskip("diffusers")

TEXT_ENCODER = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2"]
# BAT needs r to divide both sides: conv_in has 4 input channels, which r=4 divides, and everything else a multiple of 16
CASES = [*((variant, False) for variant in VARIANTS), *((variant, True) for variant in ("bone", "mini", "bat"))]
NAMED = [f"{variant}{' with 3x3' if wide else ''}" for variant, wide in CASES]

PROMPT = torch.arange(7 * 32 * 2).cos().reshape(2, 7, 32)
NOISE = torch.arange(2 * 4 * 8 * 8).sin().reshape(2, 4, 8, 8)
INPUTS = {"sample": NOISE, "timestep": torch.tensor([3, 500]), "encoder_hidden_states": PROMPT}
IDS = torch.arange(2, 26).reshape(2, 12)


def unet():
    """As in Stable Diffusion 1.5, `proj_in` and `proj_out` are 1x1 convolutions."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def text_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    return CLIPTextModel(
        CLIPTextConfig(**sizes, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    ).eval()


def pipeline():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    made = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def config(variant="bone", targets=UNET, **changes):
    settings = {"r": 4, "mini_r": 2, "variant": variant, "target_modules": targets, "init_weights": False}
    return BoneConfig(**(settings | changes))


def adapted(variant="bone", wide=False, **changes):
    torch.manual_seed(1)
    return BoneModel(unet(), config(variant, UNET + CONVOLUTIONS if wide else UNET, **changes), "default")


@torch.no_grad()
def predicted(model, **kwargs):
    return model(**INPUTS, **kwargs).sample


def image(pipe, **kwargs):
    pictures = pipe(
        "a red fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs
    ).images
    return pictures.detach()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def layers(model):
    return [module for module in model.modules() if isinstance(module, BoneLayer)]


def losses_of_training(model, loss):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(5):
        value = loss()
        losses.append(value.item())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def by_the_equations(model):
    """The plain UNet with W' in place of W: in a convolution, each offset of the kernel is a matrix of its own."""
    plain = unet()
    for name, layer in model.model.named_modules():
        if isinstance(layer, BoneLayer):
            weight, block, spec = plain.get_submodule(name).weight, layer.bone_block["default"], layer.bone_spec["default"]
            if weight.dim() == 2:
                weight.copy_(merge(weight, [Update(block, spec)]))
                continue
            height, width = weight.shape[2:]
            for i in range(height):
                for j in range(width):
                    own = block if height * width == 1 else block[i * width + j]
                    weight[:, :, i, j] = merge(weight[:, :, i, j], [Update(own, spec)])
    return plain


@pytest.mark.parametrize(("variant", "wide"), CASES, ids=NAMED)
class TestUNet:
    def test_it_starts_at_the_base_model_and_learns_in_the_adapter_alone(self, variant, wide):
        model = adapted(variant, wide, init_weights=True).train()
        assert torch.equal(predicted(model), predicted(unet()))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(".bone_block." in name for name in trained)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        losses = losses_of_training(model, lambda: (model(**INPUTS).sample - NOISE).square().mean())
        assert losses[-1] < 0.99 * losses[0]
        assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == trained

    def test_forward_is_that_of_the_updated_weights(self, variant, wide):
        model = adapted(variant, wide)
        names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, BoneConv)}
        assert names == {"proj_in", "proj_out", *(CONVOLUTIONS if wide else [])}
        assert (predicted(model) - predicted(unet())).abs().max() > 0.05
        close(predicted(model), predicted(by_the_equations(model)))

    def test_it_travels(self, variant, wide, tmp_path):
        model = adapted(variant, wide)
        save_file(get_peft_model_state_dict(model), tmp_path / "adapter.safetensors")
        again = adapted(variant, wide, init_weights=True)
        loaded = set_peft_model_state_dict(again, load_file(tmp_path / "adapter.safetensors"))
        assert not loaded.unexpected_keys
        assert torch.equal(predicted(again), predicted(model))

        whole = get_peft_model(unet(), config(variant, UNET + CONVOLUTIONS if wide else UNET))
        whole.save_pretrained(tmp_path)
        assert torch.equal(predicted(PeftModel.from_pretrained(unet(), tmp_path)), predicted(whole))

    def test_it_merges(self, variant, wide):
        model = adapted(variant, wide)
        expected, before = predicted(model), {n: t.clone() for n, t in model.state_dict().items()}
        model.merge_adapter(safe_merge=True)
        close(predicted(model), expected)
        model.unmerge_adapter()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        plain = model.merge_and_unload()
        assert type(plain) is diffusers.UNet2DConditionModel
        assert plain.state_dict().keys() == unet().state_dict().keys()
        close(predicted(plain), expected)


@pytest.mark.parametrize("variant", VARIANTS)
class TestPipeline:
    """Text encoder and UNet are replaced in the pipeline, as in the example."""

    def test_the_text_encoder_learns_and_merges(self, variant):
        model = BoneModel(text_encoder(), config(variant, TEXT_ENCODER, init_weights=True), "default")
        start = model(input_ids=IDS).last_hidden_state.detach()
        assert torch.equal(start, text_encoder()(input_ids=IDS).last_hidden_state)
        losses = losses_of_training(model, lambda: (model(input_ids=IDS).last_hidden_state - start.flip(0)).square().mean())
        assert losses[-1] < 0.99 * losses[0]
        expected = model(input_ids=IDS).last_hidden_state
        close(model.merge_and_unload()(input_ids=IDS).last_hidden_state, expected)

    def test_pictures(self, variant):
        pipe = pipeline()
        base = image(pipe)
        torch.manual_seed(1)
        pipe.text_encoder = BoneModel(pipe.text_encoder, config(variant, TEXT_ENCODER), "default")
        pipe.unet = BoneModel(pipe.unet, config(variant), "default")
        expected = image(pipe)
        assert (expected - base).abs().max() > 0.05
        for model in (pipe.text_encoder, pipe.unet):
            model.merge_adapter()
        close(image(pipe), expected)
        for model in (pipe.text_encoder, pipe.unet):
            model.unmerge_adapter()
        assert torch.equal(image(pipe), expected)
        pipe.text_encoder = pipe.text_encoder.merge_and_unload()
        pipe.unet = pipe.unet.merge_and_unload()
        assert not layers(pipe.text_encoder)
        assert not layers(pipe.unet)
        close(image(pipe), expected)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = adapted("bat", wide=True).train()
        if checkpointing:
            model.model.enable_gradient_checkpointing()
        model(**INPUTS).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's remark on every second adapter
class TestDiffusersOwnAdapters:
    def two_adapters(self, first, second):
        torch.manual_seed(1)
        model = unet()
        model.add_adapter(config(first), "first")
        model.add_adapter(config(second), "second")
        return model

    @pytest.mark.parametrize(
        ("first", "second"), [("bone", "bone"), ("bone", "bat"), ("bat", "bat"), ("bat-row", "mini"), ("bat-left", "bat-free")]
    )
    def test_weights_scale_the_updates(self, first, second):
        model = self.two_adapters(first, second)
        model.set_adapters(["first", "second"], weights=[0.7, 0.3])
        mixed = predicted(model)

        by_hand = self.two_adapters(first, second)
        for layer in layers(by_hand):
            layer.set_adapter(["first", "second"])
            layer.set_scale("first", 0.7)
            layer.set_scale("second", 0.3)
        assert torch.equal(predicted(by_hand), mixed)

        scaled = self.two_adapters(first, second)  # each update is linear in its tensor
        for layer in layers(scaled):
            layer.bone_block["first"].data.mul_(0.7)
            layer.bone_block["second"].data.mul_(0.3)
        scaled.set_adapters(["first", "second"])
        close(predicted(scaled), mixed)
        model.set_adapters(["first", "second"])
        assert (predicted(model) - mixed).abs().max() > 0.01

    def test_weights_by_block(self):
        model = self.two_adapters("bone", "bat")
        model.set_adapters("first", weights={"down": 0.0, "mid": 0.5, "up": 1.0})
        scales = {name.split("_")[0]: m.bone_scaling["first"] for name, m in model.named_modules() if isinstance(m, BoneLayer)}
        assert scales == {"down": 0.0, "mid": 0.5, "up": 1.0}

    def test_the_scale_of_one_call(self):
        model = self.two_adapters("bone", "bat")
        model.set_adapters("first")
        quarter = predicted(model, cross_attention_kwargs={"scale": 0.25})
        assert torch.equal(predicted(model, cross_attention_kwargs={"scale": 0.0}), predicted(unet()))
        assert {layer.bone_scaling["first"] for layer in layers(model)} == {1.0}
        model.set_adapters("first", weights=0.25)
        assert torch.equal(predicted(model), quarter)

    @pytest.mark.parametrize("variant", ["bone", "bat"])
    def test_on_and_off_fused_and_deleted(self, variant):
        model, base = self.two_adapters(variant, "bat-row"), predicted(unet())
        assert model.active_adapters() == ["second"]
        model.set_adapter("first")
        first = predicted(model)
        model.set_adapters(["first", "second"], weights=[0.7, 0.3])
        mixed = predicted(model)
        for off, on in ((model.disable_adapters, model.enable_adapters), (model.disable_lora, model.enable_lora)):
            off()
            assert torch.equal(predicted(model), base)
            on()
            assert torch.equal(predicted(model), mixed)
        model.fuse_lora(safe_fusing=True)
        assert all(layer.merged for layer in layers(model))
        close(predicted(model), mixed)
        model.unfuse_lora()
        assert torch.equal(predicted(model), mixed)
        model.fuse_lora(adapter_names=["first"])
        model.set_adapters("first", weights=0.7)
        with_first = predicted(model)
        model.unfuse_lora()
        close(predicted(model), with_first)
        model.set_adapters(["first", "second"])
        model.delete_adapters("second")
        assert list(model.peft_config) == ["first"]
        assert not any("second" in name for name in model.state_dict())
        assert torch.equal(predicted(model), first)
        model.unload_lora()
        assert not layers(model)
        assert torch.equal(predicted(model), base)

    def test_files(self, tmp_path):
        """diffusers' own loader makes a LoRA of every file, so PEFT's functions save and load."""
        model = self.two_adapters("bone", "bat")
        expected = predicted(model)
        save_file(get_peft_model_state_dict(model, adapter_name="second"), tmp_path / "adapter.safetensors")
        again = unet()
        again.add_adapter(config("bat", init_weights=True), "mine")
        set_peft_model_state_dict(again, load_file(tmp_path / "adapter.safetensors"), adapter_name="mine")
        assert torch.equal(predicted(again), expected)

    def test_the_pipelines_functions(self):
        pipe = pipeline()
        base = image(pipe)
        torch.manual_seed(1)
        pipe.unet.add_adapter(config("bone"), "first")
        pipe.unet.add_adapter(config("bat"), "second")
        assert pipe.get_list_adapters() == {"unet": ["first", "second"]}
        pipe.set_adapters(["first", "second"], adapter_weights=[0.7, 0.3])
        assert pipe.get_active_adapters() == ["first", "second"]
        expected = image(pipe)
        assert (expected - base).abs().max() > 0.05
        pipe.fuse_lora(components=["unet"])
        close(image(pipe), expected)
        pipe.unfuse_lora(components=["unet"])
        assert torch.equal(image(pipe), expected)
        pipe.disable_lora()
        assert torch.equal(image(pipe), base)
        pipe.enable_lora()
        assert torch.equal(image(pipe), expected)
        pipe.delete_adapters("second")
        assert pipe.get_list_adapters() == {"unet": ["first"]}
        pipe.unload_lora_weights()
        assert torch.equal(image(pipe), base)
        assert isinstance(pipe.unet.mid_block.attentions[0].proj_in, nn.Conv2d)
