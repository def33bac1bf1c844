"""Parameters trained whole beside an adapter: whose values are where, files, several adapters, merging, what is refused."""

import copy
import json

import pytest
import torch
from adapted_models import IDS, adapted, config, logits
from conftest import llama
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bonetune import AdapterFileError, BoneConfig, BoneLayer, InputError, hotswap_adapter
from bonetune.formats import bone, rwkv
from bonetune.tuner import WholeParameter, whole_parameters_of

NORM = "model.norm.weight"
INSIDE = "base_model.model."


class Block(nn.Module):
    """As RWKV's: bare parameters beside the layers that are adapted, cast where they are used."""

    def __init__(self):
        super().__init__()
        self.x_r, self.max_r = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.key = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.key(x * self.x_r.to(x.dtype)) * self.max_r.to(x.dtype)


class Mixing(PreTrainedModel):
    config_class = PretrainedConfig
    main_input_name = "input_ids"
    takes_float32_parameters = True

    def __init__(self, settings):
        super().__init__(settings)
        self.emb = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.codes = nn.Parameter(torch.arange(8), requires_grad=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.emb

    def forward(self, input_ids, **kwargs):
        x = self.emb(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def mixing(dtype=torch.float32):
    torch.manual_seed(0)
    return Mixing(PretrainedConfig()).to(dtype).eval()


def settings(whole=("x_r",), **changes):
    return config(**({"target_modules": ["key"], "trainable_parameters": [*whole]} | changes))


def mixed(base=None, **changes):
    torch.manual_seed(1)
    return get_peft_model(base or mixing(), settings(**changes)).eval()


@torch.no_grad()
def out(model):
    return model(input_ids=IDS)


@torch.no_grad()
def shift(model, adapter="default", by=0.5):
    """Other values than the base's, as after training."""
    for layer in whole_parameters_of(model).values():
        if adapter in layer.whole:
            layer.whole[adapter].add_(by)
    return model


def train(model, steps=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(input_ids=IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_is_the_base(model, base):
    assert model.state_dict().keys() == base.state_dict().keys()
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:.*Unmerging")
class TestWhoseValuesAreWhere:
    def test_names_stay_the_base_models(self):
        model, plain = mixed(), mixed(trainable_parameters=None)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        trained = {n.removeprefix(INSIDE) for n, p in model.named_parameters() if p.requires_grad and "bone" not in n}
        assert trained == {"blocks.0.x_r", "blocks.1.x_r"}

    def test_the_model_says_the_same_before_training(self):
        model = mixed(init_weights=True)
        assert torch.equal(out(model), out(mixing()))

    def test_training_leaves_the_base_alone(self):
        base = mixing()
        expected = out(base)
        model = mixed(base)
        before = out(model)
        train(model)
        after = out(model)
        assert not torch.equal(after, before)
        own = model.base_model.model.blocks[0].x_r
        with model.disable_adapter():
            assert torch.equal(out(model), expected)
            assert torch.equal(model.base_model.model.blocks[0].x_r, mixing().blocks[0].x_r)
            assert not any(p.requires_grad for p in model.parameters())
        assert model.base_model.model.blocks[0].x_r is own  # the optimizer's
        assert own.requires_grad
        assert torch.equal(out(model), after)
        assert_is_the_base(model.unload(), mixing())

    def test_norms_of_a_llama(self):
        model = adapted(
            "bat", llama(), target_modules=["q_proj"], trainable_parameters=r".*layernorm\.weight|model\.norm\.weight"
        )
        assert len(whole_parameters_of(model)) == 5
        shift(model)
        expected = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(llama()))
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("whole", [["x_r"], ["blocks.0.x_r", "1.x_r"], r"blocks\.\d\.x_r"])
    def test_ends_of_names_end_at_a_dot(self, whole):
        found = whole_parameters_of(mixed(trainable_parameters=whole))
        assert {*found} == {f"{INSIDE}blocks.{i}.x_r" for i in range(2)}

    def test_several_adapters(self):
        model = shift(mixed())
        model.add_adapter("other", settings(["x_r", "max_r"]))
        model.add_adapter("plain", settings([]))
        shift(model, "other", -0.3)
        slot, base = model.base_model.model.blocks[0], mixing().blocks[0]
        for name, x_r, max_r in (("other", -0.3, -0.3), ("default", 0.5, 0), ("plain", 0, 0), ("other", -0.3, -0.3)):
            model.set_adapter(name)
            torch.testing.assert_close(slot.x_r, base.x_r + x_r, msg=name)
            torch.testing.assert_close(slot.max_r, base.max_r + max_r, msg=name)
            assert slot.x_r.requires_grad == (name != "plain")
            assert slot.max_r.requires_grad == (name == "other")
        model.base_model.set_adapter(["plain", "default"])
        torch.testing.assert_close(slot.x_r, base.x_r + 0.5)
        before = model.base_model.active_adapters
        with pytest.raises(InputError, match=r"Adapters default, other train x_r of a Block whole.* no sum"):
            model.base_model.set_adapter(["default", "other"])
        assert model.base_model.active_adapters == before
        torch.testing.assert_close(slot.x_r, base.x_r + 0.5)

    def test_a_further_adapter_changes_nothing_of_the_first(self):
        model = shift(mixed())
        before, own = out(model), model.base_model.model.blocks[0].x_r
        model.add_adapter("other", settings())
        assert torch.equal(out(model), before)
        assert model.base_model.model.blocks[0].x_r is own
        assert own.requires_grad
        other = whole_parameters_of(model)[f"{INSIDE}blocks.0.x_r"].whole["other"]
        assert not other.requires_grad
        assert torch.equal(other, mixing().blocks[0].x_r)
        model.set_requires_grad("other")
        model.add_adapter("third", settings())
        assert other.requires_grad

    def test_frozen_in_inference(self):
        model = mixed(inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        model.set_adapter("default")
        assert model.base_model.model.blocks[0].x_r.requires_grad
        model.set_adapter("default", inference_mode=True)
        assert not model.base_model.model.blocks[0].x_r.requires_grad
        model.set_requires_grad("default", requires_grad=True)
        assert model.base_model.model.blocks[0].x_r.requires_grad

    @pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
    @pytest.mark.parametrize("others", [{"x": [], "y": ["x_r"]}, {"x": ["x_r"], "y": []}, {}])
    def test_delete(self, others):
        model = shift(mixed())
        for name, whole in others.items():
            model.add_adapter(name, settings(whole))
            shift(model, name, 0.25)
        model.delete_adapter("default")
        slot, base = model.base_model.model.blocks[0], mixing().blocks[0]
        active = model.active_adapters
        assert list(active) == [*others][:1]
        assert all([*m.active_adapters] == [*active] for m in model.modules() if isinstance(m, BoneLayer | WholeParameter))
        torch.testing.assert_close(slot.x_r, base.x_r + (0.25 if others and others["x"] else 0))
        for name in others:
            model.delete_adapter(name)
        assert torch.equal(slot.x_r, base.x_r)
        assert not whole_parameters_of(model)

    def test_deleting_one_that_is_not_active(self):
        model = shift(mixed())
        model.add_adapter("other", settings(["max_r"]))
        before = out(model)
        model.delete_adapter("other")
        assert torch.equal(out(model), before)
        assert len(whole_parameters_of(model)) == 2

    def test_a_copy_is_one_of_its_own(self):
        model = shift(mixed())
        copied = copy.deepcopy(model)
        shift(copied)
        assert torch.equal(out(model), out(shift(mixed())))
        with copied.disable_adapter():
            assert torch.equal(out(copied), out(mixing()))
        torch.testing.assert_close(copied.base_model.model.blocks[0].x_r, mixing().blocks[0].x_r + 1)

    def test_what_is_away_changes_its_dtype_too(self):
        model = shift(mixed())
        model.add_adapter("other", settings())
        kept = whole_parameters_of(model)[f"{INSIDE}blocks.0.x_r"].whole["other"]
        model.double()
        assert whole_parameters_of(model)[f"{INSIDE}blocks.0.x_r"].whole["other"] is kept
        with model.disable_adapter():
            assert torch.equal(out(model), out(mixing().double()))
        model.set_adapter("other")
        assert model.base_model.model.blocks[0].x_r.dtype == torch.float64

    def test_what_comes_in_follows_what_was_there(self):
        """A module may be moved by itself, past what is kept for it."""
        model = mixed()
        block = model.base_model.model.blocks[0]
        block._parameters["x_r"] = nn.Parameter(block.x_r.detach().to("meta"))
        with model.disable_adapter():
            assert torch.equal(block.x_r, mixing().blocks[0].x_r)
        assert block.x_r.is_meta

    def test_transformers_own_way_in(self):
        model = mixing()
        expected = out(model)
        model.add_adapter(settings(), "mine")
        shift(model, "mine")
        assert not torch.equal(out(model), expected)
        model.disable_adapters()
        assert torch.equal(out(model), expected)
        model.enable_adapters()
        assert f"{INSIDE}blocks.0.x_r".removeprefix(INSIDE) in get_peft_model_state_dict(model, adapter_name="mine")
        model.delete_adapter("mine")
        assert torch.equal(out(model), expected)

    def test_rows_of_one_batch_cannot_differ(self):
        model = mixed()
        model.add_adapter("plain", settings([]))
        for names in (["default", "__base__"], ["plain", "__base__"]):
            with pytest.raises(ValueError, match=r"different adapters on blocks\.0\.x_r, which default trains whole"):
                model(input_ids=IDS, adapter_names=names)
        model.set_adapter("plain")
        model(input_ids=IDS, adapter_names=["plain", "__base__"])

    def test_the_bias_of_an_adapted_layer(self, tmp_path):
        model = shift(mixed(whole=["key.bias"]))
        expected = out(model)
        with model.disable_adapter():
            assert torch.equal(out(model), out(mixing()))
        train(model)
        shifted = out(model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(out(PeftModel.from_pretrained(mixing(), tmp_path)), shifted)
        assert not torch.equal(shifted, expected)
        torch.testing.assert_close(out(model.merge_and_unload()), shifted)

    @pytest.mark.parametrize(
        ("autocast", "takes", "expected"),
        [(True, True, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
    )
    def test_float32_where_the_model_takes_it(self, tmp_path, monkeypatch, autocast, takes, expected):
        monkeypatch.setattr(Mixing, "takes_float32_parameters", takes)
        model = get_peft_model(mixing(torch.bfloat16), settings(), autocast_adapter_dtype=autocast)
        assert model.base_model.model.blocks[0].x_r.dtype == expected
        assert model.base_model.model.blocks[0].x_r.requires_grad
        shift(model, by=0.001)
        with model.disable_adapter():
            assert_is_the_base_of(model)
        model.save_pretrained(tmp_path)
        for low in (False, True):
            again = PeftModel.from_pretrained(
                mixing(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low
            )
            assert torch.equal(again.base_model.model.blocks[0].x_r, model.base_model.model.blocks[0].x_r)
            assert again.base_model.model.blocks[0].x_r.dtype == expected
        plain = model.merge_and_unload()
        assert {p.dtype for p in plain.parameters() if p.is_floating_point()} == {torch.bfloat16}


def assert_is_the_base_of(model):
    for i, block in enumerate(mixing(torch.bfloat16).blocks):
        assert torch.equal(model.base_model.model.blocks[i].x_r, block.x_r)
        assert model.base_model.model.blocks[i].x_r.dtype == torch.bfloat16


class TestMerging:
    def test_merge_and_unload(self):
        model = shift(mixed())
        model.add_adapter("other", settings())
        shift(model, "other", -0.5)
        for names, by in ((None, 0.5), (["other"], -0.5)):
            merged = copy.deepcopy(model)
            if names:
                model.set_adapter("other")
            expected = out(model)
            plain = merged.merge_and_unload(adapter_names=names)
            assert plain.state_dict().keys() == mixing().state_dict().keys()
            torch.testing.assert_close(out(plain), expected)
            torch.testing.assert_close(plain.blocks[0].x_r, mixing().blocks[0].x_r + by)
            assert not plain.blocks[0].x_r.requires_grad
            assert not any(isinstance(module, WholeParameter) for module in plain.modules())

    @pytest.mark.filterwarnings("ignore:.*additionally merging.*", "ignore:.*Already unmerged.*")
    def test_merge_and_unmerge(self):
        model = shift(mixed())
        model.add_adapter("other", settings())
        shift(model, "other", -0.5)
        before, expected = copy.deepcopy(model.state_dict()), out(model)
        model.merge_adapter()
        torch.testing.assert_close(out(model), expected)
        with pytest.raises(InputError, match="Adapters default, other train x_r"):
            model.merge_adapter(["other"])
        model.unmerge_adapter()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        model.merge_adapter(["other"])
        torch.testing.assert_close(model.base_model.model.blocks[0].x_r, mixing().blocks[0].x_r - 0.5)
        with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['other'\]"):
            model.delete_adapter("other")
        model.unmerge_adapter()
        assert torch.equal(out(model), expected)

    def test_disabling_unmerges(self):
        model = shift(mixed())
        expected = out(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(out(model), out(mixing()))
        assert torch.equal(out(model), expected)

    def test_safe_merge_looks_at_them(self):
        model = shift(mixed(), by=float("nan"))
        before = copy.deepcopy(model.state_dict())
        for merging in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"adapter default seems to be broken: blocks\.0\.x_r would not be finite"):
                merging(safe_merge=True)
        after = model.state_dict()
        assert all(torch.equal(after[n], before[n]) for n in before if "x_r" not in n)
        assert not any(m.merged for m in model.modules() if isinstance(m, BoneLayer | WholeParameter))

    def test_a_merge_that_fails_midway_is_undone(self):
        model = shift(mixed())
        layer = [m for m in model.modules() if isinstance(m, BoneLayer)][-1]
        layer.bone_block["default"].data = layer.bone_block["default"].data[:-1]
        with pytest.raises(ValueError, match="has shape"):
            model.merge_adapter()
        assert not any(m.merged for m in model.modules() if isinstance(m, BoneLayer | WholeParameter))

    def test_they_have_no_sum(self):
        model = mixed()
        model.add_adapter("other", settings([]))
        with pytest.raises(InputError, match=r"Adapter default trains whole parameters \(trainable_parameters=\['x_r'\]\)"):
            model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")


class TestFiles:
    def saved(self, path, **changes):
        model = shift(mixed(**changes))
        model.save_pretrained(path)
        return model

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_what_is_saved_is_loaded(self, tmp_path, low_cpu_mem_usage):
        model = self.saved(tmp_path)
        content = load_file(tmp_path / "adapter_model.safetensors")
        assert {n for n in content if "bone_block" not in n} == {f"{INSIDE}blocks.{i}.x_r" for i in range(2)}
        assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_parameters"] == ["x_r"]
        again = PeftModel.from_pretrained(mixing(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(p.is_meta or p.requires_grad for p in again.parameters())
        assert torch.equal(out(again), out(model))
        with again.disable_adapter():
            assert torch.equal(out(again), out(mixing()))
        assert_is_the_base(again.unload(), mixing())

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("trainable", [True, False])
    def test_an_adapter_that_is_not_active(self, tmp_path, low_cpu_mem_usage, trainable):
        model = self.saved(tmp_path / "first")
        other = mixed(mixing(), whole=["x_r", "max_r"])
        before = out(other)
        other.load_adapter(tmp_path / "first", "late", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=trainable)
        assert torch.equal(out(other), before)
        parameter = whole_parameters_of(other)[f"{INSIDE}blocks.0.x_r"].whole["late"]
        assert parameter.requires_grad == trainable
        assert other.base_model.model.blocks[0].x_r.requires_grad
        other.save_pretrained(tmp_path / "both")
        again = PeftModel.from_pretrained(mixing(), tmp_path / "both" / "late")
        assert torch.equal(out(again), out(model))
        other.set_adapter("late")
        assert torch.equal(out(other), out(model))
        other.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(mixing(), tmp_path / "again")
        assert torch.equal(out(again), before)

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_a_run_goes_on(self, tmp_path, low_cpu_mem_usage):
        through = mixed()
        train(through, 1)
        through.save_pretrained(tmp_path)
        resumed = mixed()
        own = resumed.base_model.model.blocks[0].x_r
        resumed.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        assert resumed.base_model.model.blocks[0].x_r is own
        assert torch.equal(out(resumed), out(through))
        train(through, 1)
        train(resumed, 1)
        torch.testing.assert_close(out(resumed), out(through))
        assert any(p is own for p in resumed.parameters())

    def test_while_disabled(self, tmp_path):
        model = shift(mixed())
        with model.disable_adapter():
            model.save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(mixing(), tmp_path)), out(model))

    def test_a_gathered_state_dict_is_taken_for_what_is_in_place(self):
        model = mixed()
        model.add_adapter("other", settings())
        gathered = {name: tensor + 7 for name, tensor in model.state_dict().items()}
        name = f"{INSIDE}blocks.0.x_r"
        own = get_peft_model_state_dict(model, state_dict=gathered)[name]
        other = get_peft_model_state_dict(model, state_dict=gathered, adapter_name="other")[name]
        assert torch.equal(own, mixing().blocks[0].x_r + 7)
        assert torch.equal(other, mixing().blocks[0].x_r)

    def test_an_adapter_may_be_called_as_a_module_is(self, tmp_path):
        model = shift(get_peft_model(mixing(), settings(), adapter_name="0").eval(), "0")
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(mixing(), tmp_path / "0", adapter_name="blocks")
        assert torch.equal(out(again), out(model))

    def test_hotswap(self, tmp_path):
        model = self.saved(tmp_path)
        again = mixed()
        own = again.base_model.model.blocks[0].x_r
        hotswap_adapter(again, tmp_path)
        assert again.base_model.model.blocks[0].x_r is own
        assert torch.equal(out(again), out(model))

    def test_everything_that_does_not_fit_is_named_at_once(self, tmp_path):
        self.saved(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        content = load_file(file)
        content[f"{INSIDE}blocks.0.x_r"] = torch.zeros(7)
        del content[f"{INSIDE}blocks.1.x_r"], content[f"{INSIDE}blocks.1.key.bone_block"]
        content[f"{INSIDE}blocks.2.x_r"] = torch.zeros(8)
        save_file(content, file)
        with pytest.raises(AdapterFileError) as error:
            PeftModel.from_pretrained(mixing(), tmp_path)
        for part in (
            r"blocks.0.x_r has shape (7,), the base model's (8,)",
            "blocks.1.x_r is missing",
            "blocks.1.key.bone_block.default is missing",
            "blocks.2.x_r is not expected",
        ):
            assert part in str(error.value)

    def test_a_file_is_never_loaded_into_anothers_parameter(self, tmp_path):
        self.saved(tmp_path)
        settings_file = tmp_path / "adapter_config.json"
        written = json.loads(settings_file.read_text())
        del written["trainable_parameters"]
        settings_file.write_text(json.dumps(written))
        model = shift(mixed(), by=1)
        before = out(model)
        with pytest.raises(AdapterFileError, match=r"blocks\.0\.x_r is not expected"):
            model.load_adapter(tmp_path, "late")
        assert torch.equal(out(model), before)

    def test_formats_read_and_write_it(self, tmp_path):
        model = self.saved(tmp_path / "first", whole=["x_r", "key.bias"])
        state = bone.read(tmp_path / "first")
        assert {*state.whole} == {f"blocks.{i}.{end}" for i in range(2) for end in ("x_r", "key.bias")}
        bone.write(state, tmp_path / "second")
        torch.testing.assert_close(out(PeftModel.from_pretrained(mixing(), tmp_path / "second")), out(model))

    def test_a_file_of_rwkv_peft_becomes_a_folder_that_loads(self, tmp_path):
        from formats import rwkv_files

        torch.save(rwkv_files.adapter("bone", 8), tmp_path / "rwkv-0.pth")
        state = rwkv.read(tmp_path / "rwkv-0.pth")
        assert state.config.trainable_parameters == sorted(state.whole) == ["blocks.0.ln1.weight", "blocks.1.ln1.weight"]
        bone.write(state, tmp_path / "folder")
        model = PeftModel.from_pretrained(a_module_for(rwkv_files.base()), tmp_path / "folder")
        for name, tensor in state.whole.items():
            assert torch.equal(model.base_model.model.get_parameter(name), tensor)


def a_module_for(weights):
    """A module that has these weights, by name."""
    root = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = root
        for number, part in enumerate(path):
            if part not in module._modules:
                linear = number == len(path) - 1 and tensor.dim() == 2
                module.add_module(part, nn.Linear(*reversed(tensor.shape), bias=False) if linear else nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(tensor))
    return root


class TestAlone:
    """An adapter that trains whole parameters and nothing else: `target_modules=[]`."""

    def test_it_trains_saves_loads_and_goes(self, tmp_path):
        model = mixed(target_modules=[])
        assert not any(isinstance(module, BoneLayer) for module in model.modules())
        train(model)
        expected = out(model)
        model.save_pretrained(tmp_path)
        assert {*load_file(tmp_path / "adapter_model.safetensors")} == {f"{INSIDE}blocks.{i}.x_r" for i in range(2)}
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == []
        again = PeftModel.from_pretrained(mixing(), tmp_path)
        assert torch.equal(out(again), expected)
        with again.disable_adapter():
            assert torch.equal(out(again), out(mixing()))
        again.merge_adapter()
        again.unmerge_adapter()
        assert torch.equal(out(again.merge_and_unload()), expected)
        state = bone.read(tmp_path)
        assert not state.tensors
        bone.write(state, tmp_path / "again")
        assert torch.equal(out(PeftModel.from_pretrained(mixing(), tmp_path / "again")), expected)

    def test_beside_one_that_adapts(self):
        model = shift(mixed(target_modules=[]))
        expected = out(model)
        model.add_adapter("other", settings([]))
        assert torch.equal(out(model), expected)
        model.set_adapter("other")
        assert not torch.equal(out(model), expected)
        model.set_adapter("default")
        assert torch.equal(out(model), expected)
        model.delete_adapter("other")
        assert torch.equal(out(model), expected)

    def test_nothing_at_all_is_an_error(self):
        with pytest.raises(ValueError, match="No `target_modules` passed"):
            mixed(target_modules=[], whole=[])

    def test_modules_that_are_not_there_stay_an_error(self):
        with pytest.raises(ValueError, match=r"Target modules \{'quay'\} not found"):
            mixed(target_modules=["quay"])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"whole": ["blocks.0.x_q"]},
                r"'blocks\.0\.x_q', which no parameter's name is or ends with; near it are blocks\.0",
            ),
            ({"trainable_parameters": r"x_r"}, r"'x_r' is a regular expression that matches no parameter's whole name"),
            ({"whole": ["x_r", "key.weight"]}, r"blocks\.0\.key\.weight \(2 such\) is adapted, and cannot be trained whole"),
            ({"whole": ["codes"]}, r"codes cannot be trained whole: it holds codes \(torch\.int64\)"),
            ({"whole": ["emb.weight"], "modules_to_save": ["emb"]}, "emb.weight cannot be .* by itself: its module is"),
            ({"trainable_parameters": "("}, "`trainable_parameters`='\\(' is not a regular expression"),
            ({"trainable_parameters": [1]}, "`trainable_parameters` should be a name or a list of names"),
        ],
    )
    def test_before_anything_is_changed(self, changes, message):
        model = mixing()
        with pytest.raises(InputError, match=message):
            mixed(model, **changes)
        assert_is_the_base(model, mixing())
        assert not any(isinstance(module, WholeParameter | BoneLayer) for module in model.modules())

    @pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
    def test_a_tied_pair(self, name):
        model = llama(tie_word_embeddings=True)
        with pytest.raises(InputError, match=r"it is one with .*or untie them"):
            get_peft_model(model, config(target_modules=["q_proj"], trainable_parameters=[name]))

    def test_a_layer_that_another_adapter_trains_whole(self):
        model = mixed(whole=["emb.weight"])
        with pytest.raises(InputError, match=r"emb\.weight .*is adapted, and cannot be trained whole"):
            model.add_adapter("other", settings([], target_modules=["emb"]))
        with pytest.raises(InputError, match=r"emb\.weight cannot be trained whole by itself"):
            model.add_adapter("other", settings([], modules_to_save=["emb"]))
        model.add_adapter("other", settings([]))

    def test_a_parameter_of_a_container(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model.gain = nn.Parameter(torch.ones(1))
        with pytest.raises(InputError, match="gain cannot be trained whole: it belongs to a Sequential itself"):
            get_peft_model(model, config(target_modules=["0"], trainable_parameters=["gain"]))


class TestConfiguration:
    def test_it_comes_back(self, tmp_path):
        written = BoneConfig(target_modules=["a"], trainable_parameters=["b", "a", "b"])
        assert written.trainable_parameters == ["a", "b"]
        written.save_pretrained(str(tmp_path))
        assert PeftConfig.from_pretrained(str(tmp_path)) == written

    @pytest.mark.parametrize("nothing", [None, [], ""])
    def test_it_is_written_only_if_it_says_something(self, tmp_path, nothing):
        BoneConfig(target_modules=["a"], trainable_parameters=nothing).save_pretrained(str(tmp_path))
        assert "trainable_parameters" not in json.loads((tmp_path / "adapter_config.json").read_text())
