"""What ZeRO refuses before anything runs. That it trains like DDP is shown on several ranks, in tests/cluster."""

import shutil
from pathlib import Path

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from nar_t2i.errors import UserError
from nar_t2i.tokenizers import VQGAN, VectorQuantizer
from nar_t2i.training import TokenizerModule, zero
from nar_t2i.training.optim import OptimizerConfig
from tests.cluster import ranks, tiny


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    zero.register()
    for name, value in {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lightnings_names_mean_zero_on_any_device(stage):
    trainer = tiny.trainer(f"deepspeed_stage_{stage}", 1, 1)
    assert isinstance(trainer.strategy, zero.ZeRO) and trainer.strategy.stage == stage


def test_offload_options_pass_through():
    made = StrategyRegistry["deepspeed_stage_3_offload"]
    config = made["strategy"](**made["init_params"]).config
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_force_ds_cpu_optimizer"] is False  # DeepSpeed's own would replace the recipe's


def test_there_is_no_fourth_stage():
    with pytest.raises(UserError, match="ZeRO has the stages 1, 2 and 3, not 4"):
        zero.ZeRO(stage=4)


def test_offload_to_nvme_is_refused():
    made = StrategyRegistry["deepspeed_stage_3_offload_nvme"]
    with pytest.raises(UserError, match="what is offloaded to NVMe cannot be saved; offload to the CPU"):
        made["strategy"](**made["init_params"])


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3_offload"])
def test_no_compiler_is_needed_and_nothing_stays_in_shared_memory(strategy, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    before = set(Path("/dev/shm").glob("deepspeed*"))
    shutil.copyfile(ranks.ROOT / "tests/cluster/tiny.yaml", tmp_path / "tiny.yaml")
    line = ["-m", "nar_t2i", "fit", "--config", "tiny.yaml", "--trainer.devices=1", f"--trainer.strategy={strategy}"]
    ended = ranks.run(1, line, tmp_path)  # not in this process, where DeepSpeed would leave hooks
    assert ended.status == [0], ended.errors
    assert not (tmp_path / "built").exists() and set(Path("/dev/shm").glob("deepspeed*")) == before


def test_a_tokenizer_is_told_to_use_ddp(tmp_path):
    codec = VQGAN(16, channels=[16, 16], patch=2, quantizer=VectorQuantizer(8, 4))
    trainer = tiny.trainer("deepspeed_stage_1", 1, 1, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="two optimizers, which DeepSpeed cannot train; use ddp"):
        trainer.fit(TokenizerModule(codec), datamodule=tiny.data())


def test_muon_is_refused(tmp_path):
    module = tiny.Generator(optimizer=OptimizerConfig(kind="muon"))
    trainer = tiny.trainer("deepspeed_stage_1", 1, 1, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="muon needs whole matrices, which ZeRO divides; use adamw, or strategy ddp"):
        trainer.fit(module, datamodule=tiny.data())
