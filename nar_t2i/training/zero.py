"""ZeRO on any device: Lightning's DeepSpeed strategy, on CUDA and on CPUs over gloo, with the gradients of DDP.

The recipe's key is Lightning's own: `trainer.strategy: deepspeed_stage_1`, `_2`, `_3`, `_2_offload`, `_3_offload`, or
`{class_path: nar_t2i.training.zero.ZeRO, init_args: {stage: 2, offload_optimizer: true}}`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from nar_t2i.errors import UserError
from nar_t2i.training import checkpoints, fragments
from nar_t2i.training.collectives import say
from nar_t2i.training.muon import MuonWithAdamW


class ZeRO(DeepSpeedStrategy):
    """ZeRO stages 1, 2 and 3 (Rajbhandari et al., arXiv 1910.02054) through DeepSpeed.

    What differs from Lightning's `DeepSpeedStrategy`, whose arguments all hold:
    - it runs on CPUs, too;
    - a loss is divided once by the number of accumulated micro-batches. Lightning and the engine each divide it, which
      makes gradients too small by that factor: SGD's updates, and the norm that clipping compares;
    - the gradient is clipped at the module's `optimizer.clip_norm`;
    - torch's AdamW is taken as it is, whose kernel for CPUs also updates states that are offloaded. DeepSpeed compiles
      nothing, and needs no compiler.
    """

    random: dict[str, Any] | None = None  # see `checkpoints.own_random_state`, of the checkpoint that was loaded

    def __init__(self, stage: int = 2, logging_batch_size_per_gpu: int = 1, **kwargs: Any) -> None:
        if stage not in (1, 2, 3):
            raise UserError(f"trainer.strategy: ZeRO has the stages 1, 2 and 3, not {stage}")
        super().__init__(stage=stage, logging_batch_size_per_gpu=logging_batch_size_per_gpu, **kwargs)
        offloads = [self.config["zero_optimization"].get(f"offload_{what}", {}) for what in ("optimizer", "param")]
        if any(offload.get("device") == "nvme" for offload in offloads):
            raise UserError("trainer.strategy: what is offloaded to NVMe cannot be saved; offload to the CPU")
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @property
    def stage(self) -> int:
        return self.config.get("zero_optimization", {}).get("stage", 0)

    # On any device

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup_environment(self) -> None:
        # Past DeepSpeedStrategy's own, which wants CUDA.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if not self._on_cpu:
            super().setup_distributed()
            return
        import deepspeed.ops

        # It sums for inference alone, and would be compiled by every first run and leave 66 MiB a rank in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return self._engine(model, self.config, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler)

    # The gradients of DDP

    def setup(self, trainer: Trainer) -> None:
        config = getattr(self.lightning_module, "optimizer_config", None)
        if config is not None:
            self.config["gradient_clipping"] = config.clip_norm
        super().setup(trainer)

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        optimizer, scheduler = super()._init_optimizers()
        if isinstance(optimizer, MuonWithAdamW):
            raise UserError(
                "model.init_args.optimizer.kind: muon needs whole matrices, which ZeRO divides; use adamw, or strategy ddp"
            )
        return optimizer, scheduler

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        kept = getattr(self.deepspeed_engine.optimizer, "persistent_parameters", ())
        if kept and self.deepspeed_engine.optimizer.overflow and kept[0].ds_status.name != "AVAILABLE":
            kept[0].all_gather(kept)  # after a step that it discards, DeepSpeed leaves divided what it then expects whole
        return result

    def skip_step(self) -> None:
        """Let the engine's next step change nothing, as it does after an overflow in fp16."""
        optimizer = self.deepspeed_engine.optimizer
        name = "_overflow_check_and_loss_scale_update" if self.stage == 3 else "check_overflow"
        checks = getattr(optimizer, "check_grad_overflow", None)

        def overflow(*args: Any, **kwargs: Any) -> bool:
            delattr(optimizer, name)  # of the instance, in front of the class's
            optimizer.check_grad_overflow = checks
            optimizer.overflow = True
            return True

        setattr(optimizer, name, overflow)
        optimizer.check_grad_overflow = True

    # Checkpoints: see `nar_t2i.training.checkpoints`

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is not divided: buffers."""
        state = self.lightning_module.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if not isinstance(value, nn.Parameter)}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # divided

    def divide(self, checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """See `fragments.divide`."""
        return fragments.divide(self.deepspeed_engine, checkpoint)

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights that this rank updates, as flat pieces of the parameters; views, by the parameter's name."""
        return {name: fragment.weight for name, fragment in fragments.of(self.deepspeed_engine).items()}

    def refresh(self) -> None:
        """To be called on all ranks after `weights` were changed."""
        fragments.refresh(self.deepspeed_engine)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if not path.is_dir():
            raise UserError(f"ckpt_path: {path} is a single file, which ZeRO cannot go on from; start from it with init_from")
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoints.first_whole(path, checkpoints.read)[1]
        used, (checkpoint, found, self.random) = checkpoints.first_whole(path, self._read)
        fragments.restore(self.deepspeed_engine, checkpoint.pop(fragments.KEY), found)
        fragments.put_averages(checkpoint, found)
        self.lightning_module.load_state_dict(checkpoint.pop("state_dict"), strict=False)
        say(f"going on from {used}")
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loaded already where training goes on; outside of training the weights are whole."""
        if "state_dict" in checkpoint:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Any] | None]:
        """What all ranks share, what this one needs, from its own file if that holds all of it, and its random states."""
        checkpoint = checkpoints.read_file(folder, checkpoints.RUN)
        if fragments.KEY not in checkpoint:
            raise UserError(f"{folder}: was not written under ZeRO; start from it with init_from, or go on without ZeRO")
        own, ranks = fragments.of(self.deepspeed_engine), checkpoints.manifest(folder)["world_size"]
        attempts = [range(ranks)] if ranks != self.world_size else [[self.global_rank], range(ranks)]
        problem = None
        for attempt in attempts:
            parts = [checkpoints.read_file(folder, checkpoints.rank_file(rank))["fragments"] for rank in attempt]
            try:
                return checkpoint, fragments.assemble(own, parts), checkpoints.own_random_state(folder)
            except fragments.Incomplete as error:
                problem = error
        raise checkpoints.Broken(f"{folder}: {problem}")

    # Outside of training

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Whole weights on every rank: nothing but weights is held there."""
        precision = {name: self.config[name] for name in ("fp16", "bf16") if name in self.config}
        remove_module_hooks(model)
        self.model, _ = self._engine(model, {"train_micro_batch_size_per_gpu": 1, **precision}, model_parameters=[])

    def _engine(self, model: nn.Module, config: dict[str, Any], **kwargs: Any) -> tuple[Any, Any]:
        """A DeepSpeed engine and its optimizer."""
        import deepspeed

        # A CPU has no index, and DeepSpeed wants one.
        device = argparse.Namespace(device_rank=self.local_rank if self._on_cpu else self.root_device.index)
        engine, optimizer, _, _ = deepspeed.initialize(device, model, dist_init_required=False, config=config, **kwargs)
        return engine, optimizer


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `module` are whole on every rank, which may change them alike. All ranks must enter.

    Only ZeRO-3 has anything to do.
    """
    divided = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0):
        yield


def register() -> None:
    """Put ZeRO behind the names that Lightning has for DeepSpeed."""
    for name in ("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload",
                 "deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"):  # fmt: skip
        known = StrategyRegistry[name]
        StrategyRegistry.register(name, ZeRO, known["description"], override=True, **known["init_params"])
