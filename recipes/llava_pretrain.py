"""Pre-train a LLaVA-style vision-language model and watch its Modality Integration Rate.

    python recipes/llava_pretrain.py fit --config recipes/configs/demo.yaml [--config more.yaml] [--key value]

Every option: ``fit --help``; the configuration a command would run: add ``--print_config``. The same command goes
on where an interrupted run stopped.
"""

import os
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    print("loading PyTorch, Lightning and Transformers", file=sys.stderr, flush=True)  # takes seconds

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from mir_lightning import MIRCallback, SDSCallback
from mir_lightning.callbacks.captions import CaptionCallback
from mir_lightning.callbacks.few_shot import FewShotCallback
from mir_lightning.callbacks.loggers import picture_folder
from mir_lightning.llava.console import MIRProgressBar, closing_report, start_table
from mir_lightning.llava.data import PretrainingData
from mir_lightning.llava.export import ExportingCheckpoint, export
from mir_lightning.llava.module import LlavaPretraining
from mir_lightning.llava.restart import (
    LAST,
    AtomicCheckpointIO,
    BetweenSteps,
    RandomStates,
    checkpoint_folder,
    interrupted_run,
    mark_finished,
)
from mir_lightning.llava.sharding import gathered
from mir_lightning.llava.signals import Preemption
from mir_lightning.llava.throughput import Throughput
from mir_lightning.llava.trainer import RecipeTrainer
from mir_lightning.report import Run, report_figure

RUN_FOLDER = "default_root_dir"  # as a logger's save_dir it stands for trainer.default_root_dir


@dataclass(frozen=True)
class ProbeFolders:
    """What to measure MIR on, instead of samples held out of the training data.

    Args:
        images: folder of pictures; picture i goes with text i, as in the MIR paper.
        texts: folder of ``.txt``, ``.story`` or ``.jsonl`` files.
    """

    images: Path | None = None
    texts: Path | None = None


class RecipeMIR(MIRCallback):
    """:class:`MIRCallback` on a probe that the data makes; all its options."""

    def __init__(self, probe: ProbeFolders = ProbeFolders(), **options: Any) -> None:
        super().__init__(probe=(), **options)
        self.folders = probe

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the probe."""
        data: PretrainingData = trainer.datamodule  # type: ignore[attr-defined]
        self.probe = data.probe(self.folders.images, self.folders.texts)
        super().on_fit_start(trainer, pl_module)


class RecipeCLI(LightningCLI):
    """A Trainer, the model, its data, and MIR on a held-out probe of that data."""

    preemption = Preemption()

    def before_instantiate_classes(self) -> None:
        """Loggers in the run's folder; no bar where the Trainer shows none; nothing is asked without items."""
        options, callbacks = self.config[self.subcommand], self._parser(self.subcommand).callback_keys
        for logger in options.trainer.logger if isinstance(options.trainer.logger, list) else ():
            if logger.init_args.get("save_dir") == RUN_FOLDER:
                logger.init_args.save_dir = options.trainer.default_root_dir or "."
        if options.trainer.enable_progress_bar is False:
            callbacks.remove("progress")
        if options.trainer.logger is False:
            callbacks.remove("throughput")
        if not options.data.caption_pictures:
            callbacks.remove("captions")
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
        """``--mir`` and what else is asked of the model; ``--checkpoint`` keeps the best, ``--restart`` last."""
        parser.add_lightning_class_args(RecipeMIR, "mir")
        for callback, name, items in (
            (SDSCallback, "sds", attrgetter("choices")),
            (FewShotCallback, "few_shot", attrgetter("few_shot")),
            (CaptionCallback, "captions", attrgetter("captions")),
        ):
            parser.add_lightning_class_args(callback, name)
            parser.link_arguments("data", f"{name}.items", compute_fn=items, apply_on="instantiate")
        for when in ("every_n_steps", "at_steps"):
            parser.link_arguments(f"mir.{when}", f"captions.{when}")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(MIRProgressBar, "progress")
        parser.add_lightning_class_args(ExportingCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BetweenSteps, "restart")
        for name in ("checkpoint", "restart"):
            parser.link_arguments("trainer.default_root_dir", f"{name}.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("mir.every_n_steps", "checkpoint.every_n_train_steps", compute_fn=lambda n: n or 1)
        best = {"monitor": "mir", "mode": "min", "filename": "{step}-{mir:.3f}"}
        last = {"filename": LAST, "enable_version_counter": False, "every_n_train_steps": 100}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in best.items()})
        parser.set_defaults({f"restart.{key}": value for key, value in last.items()})

    def before_fit(self) -> None:
        """Divide the global batch, say what is about to run, and find the checkpoint of an interrupted run."""
        self.datamodule.accumulate(self.trainer)
        reason = self.trainer.precision_reason  # type: ignore[attr-defined]
        rank_zero_info(start_table(self.trainer, reason, self.datamodule.batch_size))
        options = self.config_init[self.subcommand]
        options.ckpt_path = options.ckpt_path or interrupted_run(self.trainer)

    def after_fit(self) -> None:
        """Save the model, draw the curves, and say where everything is."""
        trainer = self.trainer
        vlm = None if self.preemption.stopped else gathered(self.model.vlm)
        if vlm is None or not trainer.is_global_zero:
            return
        mark_finished(trainer)
        callback: MIRCallback = self._get(self.config_init, "mir")
        root = Path(trainer.default_root_dir)
        export(vlm, self.model.processor, root / "model")
        folder = picture_folder(trainer, callback.name)
        curves = folder / "curves.png"
        if callback.history:
            report_figure([Run.of(callback.history)]).savefig(curves)
        print(closing_report(trainer, callback, [curves] if callback.history else [], root / "model"))


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    RecipeCLI(
        LlavaPretraining,
        PretrainingData,
        args=args,
        trainer_class=RecipeTrainer,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"use_distributed_sampler": False},
    )


if __name__ == "__main__":
    main()
