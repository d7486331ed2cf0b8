"""Pre-train a LLaVA-style vision-language model and watch its Modality Integration Rate.

    python recipes/llava_pretrain.py fit --config recipes/configs/demo.yaml [--config more.yaml] [--key value]

Every option: ``fit --help``; the configuration a command would run: add ``--print_config``. The same command goes
on where an interrupted run stopped.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mir_lightning import MIRCallback, SDSCallback
from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.callbacks.reporting import curve_figure, picture_folder
from mir_lightning.llava.console import MIRProgressBar, closing_report
from mir_lightning.llava.data import PretrainingData
from mir_lightning.llava.export import ExportingCheckpoint, export
from mir_lightning.llava.module import LlavaPretraining
from mir_lightning.llava.restart import (
    LAST,
    AtomicCheckpointIO,
    Preemption,
    RandomStates,
    checkpoint_folder,
    interrupted_run,
    mark_finished,
)


class RecipeCLI(LightningCLI):
    """A Trainer, the model, its data, and MIR on a held-out probe of that data."""

    preemption = Preemption()

    def before_instantiate_classes(self) -> None:
        """No bar where the Trainer is told to show none; no choices and no few-shot answers without items."""
        options, callbacks = self.config[self.subcommand], self._parser(self.subcommand).callback_keys
        if options.trainer.enable_progress_bar is False:
            callbacks.remove("progress")
        if not options.data.shapes_choices and options.data.choice_items is None:
            callbacks.remove("sds")
        if not options.data.shapes_few_shot:
            callbacks.remove("few_shot")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer whose runs can be killed and started again."""
        callbacks = self._get(self.config_init, "trainer").callbacks or []
        trainer = super().instantiate_trainer(callbacks=[*callbacks, RandomStates(), self.preemption], **kwargs)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--mir`` and ``--sds``, asked of the data; ``--checkpoint`` keeps the best, ``--restart`` the last."""
        parser.add_lightning_class_args(MIRCallback, "mir")
        parser.link_arguments("data", "mir.probe", compute_fn=lambda data: data.probe, apply_on="instantiate")
        parser.add_lightning_class_args(SDSCallback, "sds")
        parser.link_arguments("data", "sds.items", compute_fn=lambda data: data.choices, apply_on="instantiate")
        parser.add_lightning_class_args(FewShotCallback, "few_shot")
        parser.link_arguments(
            "data", "few_shot.items", compute_fn=lambda data: data.few_shot, apply_on="instantiate"
        )
        parser.add_lightning_class_args(MIRProgressBar, "progress")
        parser.add_lightning_class_args(ExportingCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ModelCheckpoint, "restart")
        for name in ("checkpoint", "restart"):
            parser.link_arguments("trainer.default_root_dir", f"{name}.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("mir.every_n_steps", "checkpoint.every_n_train_steps", compute_fn=lambda n: n or 1)
        best = {"monitor": "mir", "mode": "min", "filename": "{step}-{mir:.3f}"}
        last = {"filename": LAST, "enable_version_counter": False, "every_n_train_steps": 100}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
        parser.set_defaults({f"restart.{key}": value for key, value in last.items()})

    def before_fit(self) -> None:
        """Divide the global batch, and find the checkpoint of an interrupted run."""
        self.datamodule.accumulate(self.trainer)
        options = self.config_init[self.subcommand]
        options.ckpt_path = options.ckpt_path or interrupted_run(self.trainer)

    def after_fit(self) -> None:
        """Save the model, draw the curves, and say where everything is."""
        trainer = self.trainer
        if not trainer.is_global_zero or self.preemption.stopped:
            return
        mark_finished(trainer)
        callback: MIRCallback = self._get(self.config_init, "mir")
        root = Path(trainer.default_root_dir)
        export(self.model.vlm, self.model.processor, root / "model")
        folder = picture_folder(trainer, callback.name)
        curves = folder / "curves.png"
        if callback.history:
            curve_figure(callback.history).savefig(curves)
        print(closing_report(trainer, callback, [curves] if callback.history else [], root / "model"))


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    RecipeCLI(
        LlavaPretraining,
        PretrainingData,
        args=args,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"use_distributed_sampler": False},
    )


if __name__ == "__main__":
    main()
