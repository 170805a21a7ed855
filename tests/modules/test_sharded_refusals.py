"""What does not go with sharded models, or with DeepSpeed, ends before training, with a way out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.checkpointing import check_optimizer
from aapa_lightning.modules.parallel import load_placed, place, prepare_engine, refuse_engine
from aapa_lightning.sharding.files import read_step
from aapa_lightning.strategies import FSDP2Strategy, ZeROStrategy


class Mesh:
    """Sizes by name."""

    def __init__(self, data: int, tensor: int) -> None:
        self.sizes = {"data_parallel": data, "tensor_parallel": tensor}

    def __getitem__(self, name):
        return SimpleNamespace(size=lambda: self.sizes[name])

    def size(self):
        return self.sizes["data_parallel"] * self.sizes["tensor_parallel"]


def module_on(mesh=None, precision="32-true", accumulate=1, zero_stage_3=None):
    """As much of a module as is asked for its strategy."""
    strategy = SimpleNamespace(handles_gradient_accumulation=zero_stage_3 is not None, zero_stage_3=zero_stage_3)
    trainer = SimpleNamespace(strategy=strategy, precision=precision, accumulate_grad_batches=accumulate)
    return SimpleNamespace(device_mesh=mesh, trainer=trainer, _trainer=trainer)


def test_models_are_sharded_and_not_split():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size 1, found 2.*all 8 devices"):
        place(module_on(Mesh(4, 2)), torch.nn.Linear(1, 1))


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_other_precisions_are_refused(precision):
    with pytest.raises(ConfigError, match=f"expected 32-true or bf16-mixed for sharded models, found {precision}"):
        place(module_on(Mesh(2, 1), precision), torch.nn.Linear(1, 1))


def test_quantised_weights_are_not_sharded(spec):
    with pytest.raises(ConfigError, match=r"quantization=nf4.*use --trainer.strategy ddp"):
        load_placed(module_on(Mesh(2, 1)), replace(spec, lora=LoraSpec(), quantization="nf4"))


def test_settings_of_deepspeed():
    refuse_engine(module_on(zero_stage_3=False))
    refuse_engine(module_on(accumulate=4))
    with pytest.raises(ConfigError, match=r"ZeRO stage 3 .* use --trainer.strategy fsdp2"):
        refuse_engine(module_on(zero_stage_3=True))
    with pytest.raises(ConfigError, match=r"expected 1 under DeepSpeed, .* found 4"):
        refuse_engine(module_on(zero_stage_3=False, accumulate=4))


class Engine(Callback):
    """Stands for DeepSpeed's engine: the plain step is taken, or left out, and this is what the engine says of it."""

    def __init__(self, norm, applied, monkeypatch):
        self.said = SimpleNamespace(get_global_grad_norm=lambda: norm, was_step_applied=lambda: applied)
        self.monkeypatch = monkeypatch

    def on_train_start(self, trainer, pl_module):
        self.monkeypatch.setattr(type(trainer.strategy), "handles_gradient_accumulation", True)
        trainer.strategy.deepspeed_engine = self.said


@pytest.mark.parametrize("norm", [float("inf"), None])
def test_a_step_that_deepspeed_left_out_is_counted(kit, spec, monkeypatch, norm):
    rows = kit.Rows()
    module = kit.make_module("sft", spec)
    kit.fit(module, kit.make_trainer(2, logger=rows, callbacks=[Engine(norm, False, monkeypatch)]))
    assert [row["train/skipped_steps"] for _, row in rows.rows] == [1.0, 2.0]
    assert [row["train/grad_norm"] for _, row in rows.rows] == [norm or 0.0] * 2


def test_the_norm_of_a_step_is_that_of_deepspeed(kit, spec, monkeypatch):
    rows = kit.Rows()
    kit.fit(kit.make_module("sft", spec), kit.make_trainer(2, logger=rows, callbacks=[Engine(0.25, True, monkeypatch)]))
    assert [(row["train/grad_norm"], row["train/skipped_steps"]) for _, row in rows.rows] == [(0.25, 0.0)] * 2


@pytest.mark.parametrize(("norm", "finite_loss"), [(1.0, False), (float("nan"), True)])
def test_a_step_that_deepspeed_should_have_left_out_ends_the_run(kit, spec, monkeypatch, norm, finite_loss):
    class Poisoned(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            pl_module._losses_finite = finite_loss

    with pytest.raises(RuntimeError, match="step 0 is not finite, and DeepSpeed took the step"):
        kit.fit(kit.make_module("sft", spec), kit.make_trainer(1, callbacks=[Engine(norm, True, monkeypatch), Poisoned()]))


def test_deepspeed_is_told_what_it_would_look_for_before_there_is_a_model():
    module = module_on(zero_stage_3=False)
    module.trainer.strategy.config = {"zero_force_ds_cpu_optimizer": True}
    prepare_engine(module)
    assert module.trainer.strategy.config == {"zero_force_ds_cpu_optimizer": True, "train_micro_batch_size_per_gpu": 1}
    prepare_engine(module_on())


def test_weights_alone_are_not_trained_on():
    def trainer(training=True, engine=False):
        return SimpleNamespace(training=training, strategy=SimpleNamespace(handles_gradient_accumulation=engine))

    with pytest.raises(ConfigError, match=r"no optimiser state that this strategy reads.*aapa export"):
        check_optimizer({}, trainer())
    check_optimizer({}, trainer(training=False))
    check_optimizer({}, trainer(engine=True))
    check_optimizer({"optimizer_states": []}, trainer())


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"])
def test_the_names_of_deepspeed_are_our_strategy(name):
    assert StrategyRegistry[name]["strategy"] is ZeROStrategy


class Zero(ZeROStrategy):
    """As much of the strategy as lies outside of DeepSpeed."""

    def __init__(self, ranks=1, fitting=True):
        self.accelerator, self.cluster_environment, self.ranks = CPUAccelerator(), None, ranks
        fn = TrainerFn.FITTING if fitting else TrainerFn.VALIDATING
        self._lightning_module = SimpleNamespace(trainer=SimpleNamespace(state=SimpleNamespace(fn=fn)), strict_loading=True)
        self.model = SimpleNamespace(save_checkpoint=self.save, load_checkpoint=lambda path, **_: (path, {"read": str(path)}))
        self.load_full_weights, self.exclude_frozen_parameters, self.config = False, False, {}

    @property
    def world_size(self):
        return self.ranks

    def save(self, folder, client_state, tag, **_):
        (folder / tag).mkdir(parents=True)
        torch.save({**client_state, "module": {}, "dp_world_size": 2}, folder / tag / "mp_rank_00_model_states.pt")


def test_deepspeed_wants_gpus():
    with pytest.raises(ConfigError, match=r"DeepSpeed expects --trainer.accelerator gpu, found CPUAccelerator"):
        Zero().setup_environment()


def test_checkpoints_of_deepspeed_replace_each_other_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        Zero().save_checkpoint({"global_step": step, "state_dict": {}, "optimizer_states": []}, path)
        assert read_step(path) == step
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.readlink().name, "last.ckpt"]
    assert Zero(ranks=2).load_checkpoint(path) == {"read": str(path)}
    assert Zero(ranks=1, fitting=False).load_checkpoint(path) == {"read": str(path)}
    with pytest.raises(ConfigError, match="as many ranks as wrote the checkpoint, 2; found 1"):
        Zero(ranks=1).load_checkpoint(path)
    with pytest.raises(ConfigError, match="expected a checkpoint of DeepSpeed's stages 1 or 2, found another, or none"):
        Zero().load_checkpoint(tmp_path)


def test_a_model_is_rounded_as_deepspeed_rounds_it(spec):
    for config, dtype in (
        ({}, torch.float32),
        ({"bf16": {"enabled": False}}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
    ):
        module = module_on(zero_stage_3=False)
        module.trainer.strategy.config = config
        model, _ = load_placed(module, spec)
        assert {value.dtype for value in model.parameters()} == {dtype}
        assert {value.dtype for value in model.buffers()} == {torch.float32}


def test_a_module_without_a_model_to_shard_is_named(kit):
    class Head(kit.L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

    strategy = FSDP2Strategy()
    strategy.connect(Head())
    strategy._lightning_module = strategy.model
    with pytest.raises(ConfigError, match="expected a module that can be sharded, found Head"):
        strategy.setup(SimpleNamespace())


def test_the_short_name_is_lightnings_strategy(kit):
    trainer = kit.L.Trainer(strategy="fsdp2", accelerator="cpu", devices=3, logger=False, barebones=True)
    assert isinstance(trainer.strategy, ModelParallelStrategy)
    assert trainer.world_size == 3
